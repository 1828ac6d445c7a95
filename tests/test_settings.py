"""Settings refuse a wrong value by declaration, wherever it comes from, and say what is allowed."""

import copy
import dataclasses
import importlib
import pickle
import pkgutil
import types
import typing

import pytest
import tyro

import mor
from mor.files import read_json, read_toml
from mor.model.config import RouterConfig, preset
from mor.settings import Listed, PositiveInt, Settings, Share, checked
from mor.training.config import TrainConfig
from mor.training.optim import OptimConfig

OPTIONAL = {"datasets", "gguf", "lm_eval", "triton"}


class Inner(Settings, prefix="inner"):
    share: Share = 1.0
    kind: typing.Literal["fast", "slow"] | None = None
    sizes: Listed[tuple[PositiveInt, ...]] = ()


class Outer(Settings):
    count: PositiveInt
    on: bool = False
    name: str = ""
    inner: Inner = dataclasses.field(default_factory=Inner)
    either: dict[str, list[int] | dict[str, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.count == 13:
            raise ValueError("count=13 is unlucky; use 12 or 14")


WRONG = [
    (dict(count=0), "count must be at least 1, got 0"),
    (dict(count=True), "count must be a whole number, got True"),
    (dict(count=2.5), "count must be a whole number, got 2.5"),
    (dict(count=2.0), "count must be a whole number, got 2.0"),
    (dict(count="2"), "count must be a whole number, got '2'"),
    (dict(count=None), "count must be a whole number, got None"),
    (dict(), "count is missing"),
    (dict(count=1, on=1), "on must be true or false, got 1"),
    (dict(count=1, on="yes"), "on must be true or false, got 'yes'"),
    (dict(count=1, name=3), "name must be text, got 3"),
    (dict(count=1, cuont=1), "cuont is not a setting (did you mean 'count'?)"),
    (dict(count=1, inner=3), "inner must be a table of settings, got 3"),
    (dict(count=1, inner=dict(share=0)), "inner.share must be greater than 0, got 0"),
    (dict(count=1, inner=dict(share=1.5)), "inner.share must be at most 1, got 1.5"),
    (
        dict(count=1, inner=dict(share=float("nan"))),
        "inner.share must be a finite number, got nan",
    ),
    (
        dict(count=1, inner=dict(share=float("inf"))),
        "inner.share must be a finite number, got inf",
    ),
    (dict(count=1, inner=dict(share=True)), "inner.share must be a number, got True"),
    (
        dict(count=1, inner=dict(kind="fats")),
        "inner.kind must be 'fast' or 'slow', got 'fats' (did you mean 'fast'?)",
    ),
    (dict(count=1, inner=dict(sizes="12")), "inner.sizes must be a list, got '12'"),
    (dict(count=1, inner=dict(sizes=[3, 0])), "inner.sizes[1] must be at least 1, got 0"),
    (
        dict(count=1, inner=dict(shares=1)),
        "inner.shares is not a setting (did you mean 'share'?)",
    ),
    (dict(count=1, either=dict(x=3)), "either.x must be a list or a table, got 3"),
    (dict(count=1, either=dict(x=["a"])), "either.x[0] must be a whole number, got 'a'"),
    (dict(count=13), "count=13 is unlucky; use 12 or 14"),
    (dict(count=0, on=3), "count must be at least 1, got 0; on must be true or false, got 3"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_refused_in_one_line_in_python_and_from_a_file(values, message):
    for make in (lambda: Outer(**values), lambda: Outer.from_dict(values)):
        with pytest.raises(ValueError) as refused:
            make()
        assert str(refused.value) == message


def test_a_part_made_on_its_own_names_its_place_as_well():
    with pytest.raises(ValueError, match=r"^router.alpha must be greater than 0, got -1$"):
        RouterConfig(alpha=-1)
    with pytest.raises(ValueError, match=r"^optim.lr must be greater than 0, got 0$"):
        OptimConfig(lr=0)
    with pytest.raises(ValueError, match=r"^model.router.alpha must be greater than 0, got -1$"):
        TrainConfig.from_dict({"model": {"router": {"alpha": -1}}})
    with pytest.raises(ValueError, match=r"^TrainConfig is made of a table of settings, got \[\]"):
        TrainConfig.from_dict([])


def test_what_files_hold_is_taken_for_what_python_holds():
    made = Outer.from_dict(dict(count=2, inner=dict(share=1, sizes=[1, 2])))
    assert made == Outer(count=2, inner=Inner(share=1.0, sizes=(1, 2)))
    assert isinstance(made.inner.share, float) and made.inner.sizes == (1, 2)
    assert Outer.from_dict(dataclasses.asdict(made)) == made


def test_settings_stay_frozen_dataclasses():
    made = Outer(count=2)
    assert dataclasses.replace(made, count=3).count == 3
    with pytest.raises(ValueError, match="count must be at least 1"):
        dataclasses.replace(made, count=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.count = 3
    with pytest.raises(TypeError):
        Outer(2)
    assert [f.name for f in dataclasses.fields(Inner)] == ["share", "kind", "sizes"]
    assert Inner.__dataclass_fields__["share"].default == 1.0
    model = preset("tiny", num_recursions=3, router="expert_choice")
    assert hash(model) == hash(model.replace()) and model != model.replace(dim=128)
    assert pickle.loads(pickle.dumps(model)) == model == copy.deepcopy(model)


def test_flags_are_checked_too(capsys):
    args = ["--count", "3", "--inner.share", "0.5", "--inner.sizes", "1", "2", "--on"]
    made = tyro.cli(Outer, args=args)
    assert made == Outer(count=3, on=True, inner=Inner(share=0.5, sizes=(1, 2)))
    with pytest.raises(SystemExit):
        tyro.cli(Outer, args=["--count", "3", "--inner.share", "0"])
    assert "inner.share must be greater than 0, got 0.0" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )


def test_functions_check_their_arguments_and_leave_errors_of_their_own():
    @checked
    def repeat(word: str, count: PositiveInt = 1) -> str:
        if count > 9:
            raise ValueError("that is too long")
        return word * count

    assert repeat("a", 3) == repeat(word="a", count=3) == "aaa"
    for call, message in (
        (lambda: repeat("a", 0), "count must be at least 1, got 0"),
        (lambda: repeat("a", count="2"), "count must be a whole number, got '2'"),
        (lambda: repeat(), "word is missing"),
        (lambda: repeat("a", 10), "that is too long"),
    ):
        with pytest.raises(ValueError) as refused:
            call()
        assert str(refused.value) == message


def test_a_broken_file_is_named_with_the_line(tmp_path):
    toml, config = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text("steps = 3\nseed = = 4\n")
    with pytest.raises(ValueError, match=r"a.toml: .*line 2"):
        read_toml(toml)
    config.write_text('{"steps": 3,\n"seed" 4}')
    with pytest.raises(ValueError, match=r"a.json .*line 2"):
        read_json(config)


def settings_classes() -> list[type]:
    """All of mor's, found by importing every module that this machine can import."""
    for module in pkgutil.walk_packages(mor.__path__, "mor."):
        if module.name in ("mor.__main__", "mor.config", "mor.generate", "mor.hf"):  # old names
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert error.name in OPTIONAL, module.name
    return [cls for cls in below(Settings) if cls.__module__.startswith("mor.")]


def below(cls: type) -> list[type]:
    return [each for child in cls.__subclasses__() for each in (child, *below(child))]


def unbounded(hint: object, bounded: bool = False) -> bool:
    """Whether a type holds a number that nothing bounds."""
    if isinstance(hint, tuple):
        return any(unbounded(part, bounded) for part in hint)
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        limits = ("ge", "gt", "le", "lt")
        inside = [m for mark in parts[1:] for m in getattr(mark, "metadata", ())]
        return unbounded(parts[0], any(hasattr(m, limit) for m in inside for limit in limits))
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list, dict):
        return any(unbounded(part, bounded) for part in parts)
    return hint in (int, float) and not bounded


def test_every_number_among_the_settings_has_declared_bounds():
    assert unbounded(tuple[int, ...]) and unbounded(float | None) and not unbounded(bool)
    assert not unbounded(Listed[tuple[Share, ...]] | None)
    found = settings_classes()
    assert {"ModelConfig", "RouterConfig", "TrainConfig", "OptimConfig", "DataConfig"} <= {
        cls.__name__ for cls in found
    }
    for cls in found:
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            assert not unbounded(hint), f"{cls.__name__}.{name} takes any number"
