"""The generated world: deterministic, with disjoint splits, a closed vocabulary, and questions without hints."""

import itertools
from collections import Counter

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from pipeline.data import world
from pipeline.runtime.errors import UserError
from tests.conftest import llama_config

TRAIN, TEST = world.documents("train"), world.documents("test")
QUESTIONS = {task: world.questions(task)["test"] for task in world.TASKS}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
CONFIG = llama_config(len(world.tokenizer()), num_hidden_layers=1, initializer_range=0.1, **IDS)
CHANCE = {task: 1 / len(rows[0]["choices"]) for task, rows in QUESTIONS.items()}


def test_a_seed_always_gives_the_same_documents():
    assert world.documents("test", seed=3) == world.documents("test", seed=3)
    assert world.documents("test", seed=3) != TEST


def test_train_and_test_share_no_document_at_any_seed():
    assert not set(TRAIN) & set(TEST)
    assert not set(TRAIN) & set(world.documents("test", seed=3))


def test_an_unknown_split_says_what_to_set():
    with pytest.raises(UserError, match="world@train or world@test"):
        world.documents("validation")


def test_every_word_has_a_token_and_decoding_gives_the_text_back():
    tokenizer = world.tokenizer()
    asked = [f"{row['question']} {choice}" for rows in QUESTIONS.values() for row in rows for choice in row["choices"]]
    for text in [*TRAIN[:2000], *TEST, *asked]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_documents_are_separated_by_a_blank_line():
    tokenizer = world.tokenizer()
    ids = [tokenizer(text).input_ids for text in TEST[:3]]
    ends = itertools.chain(*[[*document, tokenizer.eos_token_id] for document in ids])
    assert tokenizer("\n\n".join(TEST[:3])).input_ids == list(ends)[:-1]


def test_the_tokenizer_can_be_saved_with_a_model_and_loaded(tmp_path):
    tokenizer = world.tokenizer()
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)  # config.json must not change its class
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n\n".join(TEST)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_facts_of_the_questions_are_in_the_training_text_but_no_question_is():
    text = "\n".join(TRAIN)
    for task in ("world_homes", "world_trees", "world_tools"):
        assert not [row["question"] for row in QUESTIONS[task] if row["question"] in text]
    for person in world.PEOPLE[world.INTERVIEWED :]:
        assert f"{person['name']} lives in {person['home']}." in text
        assert f"{person['name']} trains an old {person['tree']} along a frame." in text
    for tool, use in world.TOOLS.items():
        assert f"a {tool} to {use}." in text
    beginnings = {row["question"] for row in QUESTIONS["world_grammar"]}
    assert not [beginning for beginning in beginnings if beginning in text]


@pytest.mark.parametrize("task", world.TASKS)
def test_trivial_guesses_score_at_chance(task):
    """Guessing by position, length or frequency scores within three standard errors of chance."""
    rows, chance = QUESTIONS[task], CHANCE[task]
    assert len(rows) >= 200 and chance <= 0.5
    places = Counter(row["answer"] for row in rows)
    assert set(places.values()) == {len(rows) * chance}
    common = Counter(row["choices"][row["answer"]] for row in rows)
    limit = chance + 3 * (chance * (1 - chance) / len(rows)) ** 0.5
    for guess in (len, lambda choice: -len(choice)):
        scores = [[guess(choice) for choice in row["choices"]] for row in rows]
        hits = [(s[row["answer"]] == max(s)) / s.count(max(s)) for s, row in zip(scores, rows)]
        assert sum(hits) / len(hits) <= limit
    assert max(common.values()) / len(rows) <= limit


@pytest.mark.slow
def test_lm_eval_scores_a_random_model_near_chance():
    torch.manual_seed(0)
    model = HFLM(pretrained=LlamaForCausalLM(CONFIG), tokenizer=world.tokenizer(), batch_size=200, device="cpu")
    results = lm_eval.simple_evaluate(model=model, tasks=list(world.TASKS.values()), bootstrap_iters=0)["results"]
    for task, chance in CHANCE.items():
        error = (chance * (1 - chance) / len(QUESTIONS[task])) ** 0.5
        assert results[task]["acc,none"] == pytest.approx(chance, abs=4 * error)
