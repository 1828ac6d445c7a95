"""mor costs: the paper's model."""

from mor.cli import main
from tests.cli.printed import last_json


def test_costs_of_the_papers_model(capsys):
    three = ["costs", "--preset", "smollm-360m", "--num-recursions", "3", "--json"]
    main([*three, "--recipe", "paper"])
    found = last_json(capsys)
    assert round(found["paper_mflops_per_token"], 1) == 555.6 and found["mean_depth"] == 2.0
    main(three)
    ours = last_json(capsys)
    assert (found["recipe"], ours["recipe"]) == ("paper", "recommended")
    assert (found["kv_strategy"], ours["kv_strategy"]) == ("recursion_wise", "hybrid")
    assert {"params_non_embedding", "train_flops_per_token", "kv_bytes_per_token"} <= found.keys()
    main(["costs", "--preset", "smollm-360m", "--num-recursions", "1"])
    assert "314,635,200" in capsys.readouterr().out
