"""Files of weights: every tensor is accounted for, whatever holds it."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from mor.weights import Weights, account, of_state, open_weights, read_all

A, B = torch.arange(6.0).view(2, 3), torch.ones(4)
WANTED = {"layer.a": (2, 3), "b": (4,)}


def test_what_is_missing_left_over_or_of_another_shape_is_named():
    offered = of_state("x.safetensors", {"layer.a": A.T, "c": B, "d.inv_freq": B})
    with pytest.raises(ValueError) as error:
        account(WANTED, offered, left_out=["*.inv_freq"])
    assert str(error.value).endswith(
        "missing: b; left over: c; of another shape: layer.a is (3, 2), should be (2, 3)"
    )
    many = of_state("x", {f"t{i}": B for i in range(9)})
    with pytest.raises(ValueError, match="left over: t0, t1, t2, t3, t4, t5 and 3 more"):
        account({}, many)


def test_prefixes_count_only_where_every_name_has_them():
    found = account(WANTED, of_state("x", {"module.layer.a": A, "module.b": B}))
    assert found == {"layer.a": "module.layer.a", "b": "module.b"}
    with pytest.raises(ValueError, match=r"missing: layer\.a; left over: module\.layer\.a"):
        account(WANTED, of_state("x", {"module.layer.a": A, "b": B}))
    with pytest.raises(ValueError, match=r"twice: model\.b and b"):
        account(WANTED, of_state("x", {"model.layer.a": A, "model.b": B, "b": B}))


def test_only_finite_floating_point_numbers_are_weights():
    for tensor, words in [
        (torch.tensor([1, torch.nan, torch.inf]), "b in x has 2 values of 3 that are not finite"),
        (torch.ones(3, dtype=torch.int8), "b in x is stored as torch.int8"),
        (torch.ones(3).to(torch.float8_e4m3fn), "b in x is stored as torch.float8_e4m3fn"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_all(of_state("x", {"b": tensor}), {"ours": "b"})


def write_shards(folder, weight_map=None):
    save_file({"layer.a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    names = {"layer.a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_shards_are_read_as_one_and_compared_with_their_index(tmp_path):
    names = write_shards(tmp_path)
    found = open_weights(tmp_path)
    assert found.shapes == WANTED
    assert torch.equal(found.read("layer.a"), A) and torch.equal(found.read("b"), B)
    first = "model-00001-of-00002.safetensors"
    for weight_map, words in [
        (names | {"c": first}, "differ in: c"),
        ({"layer.a": names["b"], "b": first}, "differ in: b, layer.a"),
        (
            {"layer.a": first},
            "does not name these files of weights beside it: model-00002-of-00002",
        ),
        (names | {"c": "model-00003-of-00002.safetensors"}, "missing: model-00003-of-00002"),
        (names | {"b": "../b.safetensors"}, "outside its folder: ../b.safetensors"),
        ({}, "it has no weight_map"),
    ]:
        write_shards(tmp_path, weight_map)
        with pytest.raises(ValueError, match=words):
            open_weights(tmp_path)
    save_file({"b": B}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not name these files of weights beside it"):
        open_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; merge it"):
        open_weights(tmp_path)


class Hostile:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_pickled_tensors_are_read_and_pickled_code_does_not_run(tmp_path, capsys):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"b": B}, file)
    found = open_weights(tmp_path)
    assert isinstance(found, Weights) and torch.equal(found.read("b"), B)
    for bad in ({"b": Hostile()}, {"b": 3}, [B]):
        torch.save(bad, file)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin .*holds more than"):
            open_weights(tmp_path)
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged") as error:
        open_weights(tmp_path)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk" * 100,
        b"PK\3\4" + b"\0" * 50,
        b"\x80\2",
        b"\x80\2J.",
        b"\x80\2X\xff\xff\xff\xff",
    ],
)
def test_pickled_junk_is_named_in_one_line(content, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is damaged or holds more than ten.*d$"
    ):
        open_weights(tmp_path)


@pytest.mark.parametrize("stray", ["model-00001-of-00017.safetensors", "pytorch_model.bin"])
def test_weights_beside_those_that_are_read_are_named(stray, tmp_path):
    save_file({"b": B}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").touch()
    assert torch.equal(open_weights(tmp_path).read("b"), B)
    (tmp_path / stray).touch()
    with pytest.raises(
        ValueError, match=rf"model\.safetensors does not name .* beside it: {stray}"
    ):
        open_weights(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 60])
def test_a_file_cut_short_is_named(length, tmp_path):
    save_file({"b": B}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        open_weights(tmp_path)
