"""A module that files of the fuzzer name: whoever imports it has followed a name that a file gave."""


def run(*args, **kwargs):
    """What a file would like to have called."""
    raise SystemExit("code that a file named was run")
