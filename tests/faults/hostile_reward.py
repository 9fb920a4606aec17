"""A reward that does whatever the completion says, as code that a model wrote might: a plugin."""

import ctypes
import os
import subprocess
import sys
import time
from typing import Literal

from dteframe import Reward, RewardConfig, hookimpl


class HostileConfig(RewardConfig):
    type: Literal["hostile"] = "hostile"


class Hostile(Reward):
    """Do what the completion says; 1 where it says nothing known, None for an empty text."""

    config: HostileConfig

    def score(self, question, completions):
        scores = [obey(completion.text) for completion in completions]
        return scores[1:] if any(completion.text == "wrong length" for completion in completions) else scores


def obey(text):
    match text:
        case "endless loop":
            while True:
                pass
        case "sleep":
            time.sleep(1000)
        case "power tower":
            return float(9**9**9**9 > 0)
        case "10 GB":
            return float(len(bytearray(10 * 2**30)))
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(7)
        case "polite exit":
            sys.exit(7)
        case "exception":
            raise ZeroDivisionError("by zero")
        case "interrupt":
            raise KeyboardInterrupt
        case "nan":
            return float("nan")
        case "text":
            return "no number"
        case "fork that comes back":
            os.fork()
        case "fork and sleep":
            os.fork()
            time.sleep(1000)
        case "fork that stays":
            if os.fork() == 0:
                time.sleep(1000)
        case "orphan":
            command = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
            subprocess.run([sys.executable, "-c", command], check=True)
        case "torch":
            return float("torch" in sys.modules)
        case "":
            return None
    return 1.0


@hookimpl
def dteframe_components():
    return [Hostile]
