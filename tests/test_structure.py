"""Structured output: every answer that is complete is what it should be, and a structure that
cannot be followed is refused with the reason."""

import json
import random
import re
import sys

import pytest

from mor.answer import Answer, allowed_rows
from mor.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe
from mor.engine import Engine, EngineConfig, SamplingParams
from mor.generation import generate
from mor.structure import Structure, grammars
from tests.conftest import tiny

BYTES = byte_tokenizer()
BPE = train_bpe(['{"name": "text", "size": 12, "is": true, "list": [1, 2, null]} ' * 5], 300)


def draw_schema(draw, depth=0):
    """A random schema that every answer to ends before long."""
    kinds = ["integer", "string", "enum", "boolean", "null", "number"]
    kind = draw.choice(kinds + ["object", "array", "anyOf"] * (depth < 2))
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": kind, "minimum": low, "maximum": low + draw.randint(0, 500)}
    if kind == "string":
        least = draw.randint(0, 3)
        return {"type": kind, "minLength": least, "maxLength": least + draw.randint(0, 5)}
    if kind == "number":
        return {"type": "string", "pattern": f"^-?[0-9]{{1,{draw.randint(1, 4)}}}[.][0-9]$"}
    if kind == "enum":
        return {"enum": draw.sample(["a", "some text", 3, None, True, "é", "日本"], 3)}
    if kind == "array":
        least = draw.randint(0, 2)
        items = draw_schema(draw, depth + 1)
        return {"type": kind, "items": items, "minItems": least, "maxItems": least + 2}
    if kind == "anyOf":
        return {"anyOf": [draw_schema(draw, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = draw.sample(["a", "b", "name", "two words", "ß"], draw.randint(0, 3))
        required = [name for name in names if draw.random() < 0.7]
        of = {name: draw_schema(draw, depth + 1) for name in names}
        of = {"type": kind, "properties": of, "additionalProperties": False}
        return of | {"required": required}
    return {"type": kind}


def fits(value, schema):
    """Whether a value is of a schema, of the kinds that are drawn here."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    kinds = {"integer": int, "string": str, "array": list, "object": dict}
    if type(value) is not kinds.get(schema["type"], type(value)):
        return False
    if schema["type"] == "integer":
        return schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        if "pattern" in schema:
            return re.search(schema["pattern"], value) is not None
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    if schema["type"] == "array":
        of = all(fits(each, schema["items"]) for each in value)
        return of and schema["minItems"] <= len(value) <= schema["maxItems"]
    if schema["type"] == "object":
        known = schema["properties"]
        of = all(name in known and fits(each, known[name]) for name, each in value.items())
        return of and set(schema["required"]) <= set(value)
    return value is None if schema["type"] == "null" else type(value) is bool


def _serve_schemas(count, seed):
    draw = random.Random(seed)
    schemas = [draw_schema(draw) for _ in range(count)]
    tokenizer = draw.choice([BYTES, BPE])
    model = tiny(vocab_size=tokenizer.vocab_size + 3, max_seq_len=1200)
    params = [
        SamplingParams(
            max_new_tokens=1190,
            temperature=draw.choice([0.0, 0.5, 1.0]),
            seed=i,
            structure=Structure(kind="json_schema", text=json.dumps(schema)),
        )
        for i, schema in enumerate(schemas)
    ]
    settings = dict(max_num_seqs=16, batching=draw.choice(["auto", "depth_wise"]))
    engine = Engine(model, tokenizer, EngineConfig(**settings))
    requests = engine.generate([[i % 200] for i in range(count)], params)
    for request, schema in zip(requests, schemas, strict=True):
        assert request.finish_reason == "stop", (request.error, schema, request.text)
        assert fits(json.loads(request.text), schema), (request.text, schema)
    return requests


def test_random_schemas_give_finished_answers_that_are_valid():
    requests = _serve_schemas(15, seed=0)
    assert len({request.text for request in requests}) > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_500_random_schemas(seed):
    _serve_schemas(50, seed)


def test_the_check_of_values_can_fail():
    schema = {"type": "array", "items": {"enum": [1, "a"]}, "minItems": 1, "maxItems": 2}
    assert fits(["a", 1], schema)
    assert not fits([], schema) and not fits([True], schema) and not fits(["b"], schema)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (Structure(kind="regex", text="(ab|cd){1,3}é?!"), "(ab|cd){1,3}é?!"),
        (
            Structure(kind="lark", text='start: "x" n\nn: /[0-9]{2}/ ("," n)?'),
            r"x(\d\d,){0,16}\d\d",
        ),
        (Structure(kind="json_schema", text='{"enum": ["日本", "🙂"]}'), '"(日本|🙂)"'),
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_every_kind_is_followed(structure, pattern, tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size)
    for seed in range(3):
        params = SamplingParams(max_new_tokens=50, seed=seed, structure=structure)
        (result,) = generate(model, [[1]], params, tokenizer=tokenizer)
        assert result.finish_reason == "stop" and re.fullmatch(pattern, result.text)


def test_any_json_object():
    params = SamplingParams(max_new_tokens=60, structure=Structure(kind="json_object"))
    biased = dict.fromkeys(BYTES.encode('}":1'), 12.0)  # or a random model goes on for long
    params = SamplingParams(**{**vars(params), "logit_bias": biased})
    model = tiny(vocab_size=257)
    done = 0
    for seed in range(6):
        params = SamplingParams(**{**vars(params), "seed": seed})
        (result,) = generate(model, [[1]], params, tokenizer=BYTES)
        assert result.text.lstrip().startswith("{")
        if result.finish_reason == "stop":
            done += 1
            assert isinstance(json.loads(result.text), dict)
    assert done


def test_white_space_in_json_has_an_end():
    """A model that loves spaces would otherwise write nothing else."""
    love = {BYTES.encode(" ")[0]: 100.0}
    structure = Structure(kind="json_schema", text='{"type": "array", "items": false}')
    params = SamplingParams(max_new_tokens=60, structure=structure, logit_bias=love)
    (result,) = generate(tiny(vocab_size=257), [[1]], params, tokenizer=BYTES)
    assert result.finish_reason == "stop" and json.loads(result.text) == []


def _may_follow(answer, vocab_size=257):
    (allowed,) = allowed_rows([answer], vocab_size)
    return set(allowed.nonzero()[0].tolist())


def test_it_ends_where_it_is_complete_and_no_sooner():
    """With an end token if it might go on, without one if it cannot; any stop token ends it where
    it may end; and it does not end before min_new_tokens, unless nothing can follow."""
    end, (a, b, c) = BYTES.end_of_text_id, BYTES.encode("abc")

    def answer(**settings):
        structure = Structure(kind="regex", text="ab?")
        return Answer(SamplingParams(structure=structure, **settings), [1], BYTES)

    short = answer(stop_token_ids=(c,))
    assert _may_follow(short) == {a}
    assert short.take(a) == "a" and _may_follow(short) == {b, c, end}
    assert short.take(end) == "" and (short.finish_reason, short.stop_reason) == ("stop", end)
    long = answer()
    long.take(a)
    assert long.take(b) == "b" and (long.finish_reason, long.stop_reason) == ("stop", None)
    stopped = answer(stop_token_ids=(c,))
    stopped.take(a)
    stopped.take(c)
    assert (stopped.text, stopped.stop_reason) == ("a", c)
    waits = answer(min_new_tokens=3)
    waits.take(a)
    assert _may_follow(waits) == {b}
    waits.take(b)
    assert waits.finish_reason == "stop"
    cut = answer(max_new_tokens=1)
    cut.take(a)
    assert cut.finish_reason == "length"


def test_any_end_token_ends_it_and_one_that_the_grammar_wants_does_not():
    made = byte_tokenizer().backend
    made.add_special_tokens(["<|im_end|>"])
    ends = {"generation_config.json": '{"eos_token_id": [257, 256]}', "tokenizer_config.json": "{}"}
    tokenizer, (a, b) = Tokenizer(made, files=ends), BYTES.encode("ab")
    for text, ids, may_follow, stop_reason in (
        ('start: "a" "b"?', [a, 257], {b, 256, 257}, 257),
        ('start: "a" "b"?', [a, 256], {b, 256, 257}, 256),
        ('start: "a" <|im_end|> "b"', [a, 257, b], {257}, None),
    ):
        answer = Answer(SamplingParams(structure=Structure(kind="lark", text=text)), [1], tokenizer)
        answer.take(ids[0])
        assert _may_follow(answer, 258) == may_follow
        for token_id in ids[1:]:
            assert answer.finish_reason is None
            answer.take(token_id)
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop_reason)
        assert answer.text == tokenizer.decode(ids)


def test_a_dead_end_is_an_error_that_says_so():
    """In the engine of that request alone."""
    structure = Structure(kind="regex", text="[ab]{3}")
    bans = {i: float("-inf") for i in BYTES.encode("ab")}
    params = SamplingParams(max_new_tokens=9, structure=structure, logit_bias=bans)
    model = tiny(vocab_size=257)
    with pytest.raises(ValueError, match="forbid every token"):
        generate(model, [[1]], params, tokenizer=BYTES)
    for settings in ({}, {"loop": "device"}):
        engine = Engine(model, BYTES, EngineConfig(**settings))
        dead, other = engine.generate(
            [[1], [1]], [params, SamplingParams(max_new_tokens=3, structure=structure)]
        )
        assert dead.finish_reason == "error" and "no token may follow" in dead.error
        assert other.finish_reason == "stop" and re.fullmatch("[ab]{3}", other.text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "a(", "unclosed group"),
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("json_schema", '{"type": "string", "format": "no such"}', "no such"),
        ("lark", "start: foo", 'unknown name: "foo"'),
    ],
)
def test_what_llguidance_refuses_is_refused_with_its_reason(kind, text, words):
    params = SamplingParams(max_new_tokens=9, structure=Structure(kind=kind, text=text))
    model = tiny(vocab_size=257)
    with pytest.raises(ValueError, match=rf"structure \({kind}\) cannot be followed.*{words}"):
        generate(model, [[1]], params, tokenizer=BYTES)
    engine = Engine(model, BYTES)
    with pytest.raises(ValueError, match=words):
        engine.add_request([1], params)
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(kind="json_schema", text="{"), "the JSON schema is not JSON"),
        (dict(kind="json_schema", text="[1]"), "must be a JSON object"),
        (dict(kind="json_object", text="{}"), "takes no text"),
        (dict(kind="regex"), "needs a text"),
        (dict(kind="xml", text="x"), "kind must be"),
    ],
)
def test_what_is_no_structure_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Structure(**settings)


def test_a_tokenizer_is_needed_and_must_fit_the_model():
    params = SamplingParams(max_new_tokens=9, structure=Structure(kind="json_object"))
    for run in (
        lambda: generate(tiny(), [[1]], params),
        lambda: Engine(tiny()).add_request([1], params),
    ):
        with pytest.raises(ValueError, match="a structure cannot be followed without a tokenizer"):
            run()
    with pytest.raises(ValueError, match="do not belong together"):
        generate(tiny(), [[1]], params, tokenizer=BYTES)


def test_compiled_once_for_all_answers():
    made = grammars(BYTES)
    assert grammars(BYTES) is made
    structure = Structure(kind="regex", text="once|twice")
    before = made._compiled.cache_info().misses
    for _ in range(3):
        made.matcher(structure)
    assert made._compiled.cache_info().misses == before + 1


def test_without_llguidance_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    other = Tokenizer(BYTES.backend, end_of_text=END_OF_TEXT)
    with pytest.raises(ImportError, match=r"structured output.*recursions\[serve\]"):
        grammars(other)
