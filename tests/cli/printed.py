"""What a command printed, as values."""

import json

from mor.cli import main


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def found_json(capsys, *arguments):
    capsys.readouterr()
    main([str(word) for word in arguments] + ["--json"])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])
