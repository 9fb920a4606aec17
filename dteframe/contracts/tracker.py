"""Trackers: who is told?"""

from __future__ import annotations

from dteframe.contracts.component import Component, PluginConfig


class TrackerConfig(PluginConfig):
    """Options that every tracker has."""


class Tracker(Component):
    """Who is told?

    Implements any of the watching hooks (``dteframe.hookspecs``) as methods with ``@hookimpl``.
    """

    kind = "tracker"
    config: TrackerConfig
