"""Finished work on the disk, so that a run that was interrupted goes on where it was."""

import json


class Journal:
    """A file with a JSON line per result, each under a key that says all that the result depends on.

    Lines are on the disk as soon as they are known. One that a crash tore is passed over: its work is done again.
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
        """The result of a key (a dict that JSON can hold), None if it is not known."""
        return self._results.get(_text(key))

    def add(self, key, result):
        self._results[_text(key)] = result
        self._file.write(json.dumps({"key": key, "result": result}) + "\n")
        self._file.flush()

    def items(self):
        """(key, result) of all that is known, in the order in which keys were first added."""
        return [(json.loads(key), result) for key, result in self._results.items()]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def _text(key):
    return json.dumps(key, sort_keys=True)
