"""Finished work on disk, so that an interrupted run can continue."""

import json


class Journal:
    """A file with one JSON line per result. Its key has everything that the result depends on.

    Lines are written as soon as they are known. A line that a crash cut off is skipped, and its work is done again.
    """

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._results = {}
        written = path.read_text(errors="replace") if path.exists() else ""
        for line in written.splitlines():
            try:
                entry = json.loads(line)
                self._results[_text(entry["key"])] = entry["result"]
            except (ValueError, TypeError, KeyError):
                continue
        self._file = path.open("a")
        if written and not written.endswith("\n"):
            self._file.write("\n")

    def get(self, key):
        """The result of a key (a dict that JSON can hold), or None if there is none."""
        return self._results.get(_text(key))

    def add(self, key, result):
        self._results[_text(key)] = result
        self._file.write(json.dumps({"key": key, "result": result}) + "\n")
        self._file.flush()

    def items(self):
        """(key, result) of all results, in the order in which their keys were first added."""
        return [(json.loads(key), result) for key, result in self._results.items()]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def _text(key):
    return json.dumps(key, sort_keys=True)
