"""The promises that plugins keep, and small fakes to check them with."""
