"""Runs and models in a few words."""

from mor.cli.describe import corpus_name, data_facts, flat, model_facts
from mor.data.config import DataConfig
from mor.model.config import preset
from tests.conftest import tiny


def test_the_facts_of_a_model_are_those_that_mean_something_for_it():
    vanilla, mor = (
        model_facts(preset("tiny", num_recursions=n, router=kind))
        for n, kind in ((1, "fixed"), (2, "expert_choice"))
    )
    assert vanilla["family"] == "vanilla" and not {"kv_strategy", "gate"} & vanilla.keys()
    assert mor["family"] == "mor" and mor["capacities"] == [1.0, 0.5]
    assert not {"deepened", "adapters"} & mor.keys()
    assert mor["params"] > mor["params_non_embedding"]


def test_facts_of_a_model_say_what_was_added_to_its_source():
    facts = model_facts(tiny("gain", deepened=True, lora_rank=3).config)
    assert facts["deepened"] is True
    assert facts["adapters"] == "LoRA of rank 3 from recursion 2 on"


def test_the_data_of_a_run_in_words(tmp_path):
    own = data_facts(DataConfig(path=str(tmp_path / "a.txt"), validation_share=0.1))
    assert own["text"] == f"text of {tmp_path / 'a.txt'}" and own["tokenizer"] == "bpe"
    assert own["validation"] == "10.0% of the text"
    task = data_facts(DataConfig(path="task:state-tracking?hops=3"))
    assert task["text"] == "task:state-tracking?hops=3" and task["tokenizer"] == "the task's own"
    assert data_facts(DataConfig(validation_path="b.txt"))["validation"] == "b.txt"
    assert "Python's own documentation" in corpus_name(DataConfig())


def test_nested_settings_have_dotted_names():
    nested = {"steps": 3, "model": {"router": {"kind": "fixed"}, "capacities": (1.0, 0.5)}}
    assert dict(flat(nested)) == {
        "steps": 3,
        "model.router.kind": "fixed",
        "model.capacities": [1.0, 0.5],
    }
