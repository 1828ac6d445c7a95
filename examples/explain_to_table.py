"""What the router did with a text, as a data frame (needs pandas).

python examples/explain_to_table.py runs/mor "The first evidence of horses in warfare"
"""

import sys

import pandas

import mor


def main(run: str, text: str = "The first evidence of horses in warfare") -> pandas.DataFrame:
    _, model, tokenizer = mor.load(run)
    found = mor.explain(model, tokenizer, text)
    table = pandas.DataFrame(found.records())  # a row per token and recursion
    taken = table[table["taken"]]
    print(taken.groupby(["index", "token"])["recursion"].max().rename("depth").to_string())
    print(f"mean depth {found.mean_depth:.2f}")
    return table


if __name__ == "__main__":
    main(*sys.argv[1:])
