"""What is no part of the work cannot end it, and says once what is lost."""

import sys
import warnings

import pytest

from mor.accessories import accessory, plain_warnings


def test_a_failure_is_a_warning_that_comes_once():
    broken, done = set(), []
    with pytest.warns(UserWarning, match=r"no lines \(pipe is gone\); the work goes on") as said:
        for i in range(3):
            with accessory("no lines", broken):
                done.append(i)
                raise BrokenPipeError("pipe is gone")
    assert done == [0, 1, 2] and len(said) == 1
    with pytest.raises(KeyboardInterrupt), accessory("no lines", broken):
        raise KeyboardInterrupt


def test_warnings_are_one_line_and_need_no_reader(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", None)
    plain_warnings()
    for line in (3, 4):
        warnings.showwarning(UserWarning("less memory"), UserWarning, "file.py", line)
    assert capsys.readouterr().err == "warning: less memory\n"

    class Gone:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    warnings.showwarning(UserWarning("nobody reads this"), UserWarning, "file.py", 3)
