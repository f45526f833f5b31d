"""The shipped models: what they are, how they speak, and that what they are said to know they know."""

import json
import re
from dataclasses import replace
from itertools import islice

import pytest
from safetensors import safe_open

from reflux.assets import folder
from reflux.assets.characters import CHARACTERS, SPECIALS, character_tokenizer
from reflux.assets.make import accuracy, cold_start, encode, lessons, main
from reflux.assets.specs import SHOWN, SPECS, Spec
from reflux.assets.text_models import blank, first
from reflux.tasks.chains import Chains
from reflux.tasks.word_problems import WordProblems

NAMES = ("student", "teacher", "mul_teacher", "novice", "reader", "chain_student", "chain_teacher")
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TINY = Spec(
    "tiny",
    layers=1,
    steps=2,
    seed=0,
    width=16,
    inner=16,
    heads=2,
    batch=4,
    warmup=1,
    exam=WordProblems(held_out=6),
)


def shipped(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder(name)), AutoTokenizer.from_pretrained(folder(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_exactly_these_files_and_is_small(name):
    assert {path.name for path in folder(name).iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder(name).iterdir()) < 2_000_000
    with safe_open(folder(name) / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 == {"F32"}


def test_the_shipped_tokenizers_are_one_and_the_one_the_code_makes():
    made = json.loads(character_tokenizer().backend_tokenizer.to_str())
    for name in NAMES:
        _, tokenizer = shipped(name)
        assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == made["model"]
        assert tokenizer.chat_template == character_tokenizer().chat_template
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == (
            "<end>",
            "<pad>",
            "left",
        )


@pytest.mark.parametrize("text", [CHARACTERS, "Tom  has 1\n x .", " a , b . don't !", ""])
def test_known_text_comes_back_as_it_was_one_character_a_token(text):
    tokenizer = character_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text", ["é", "日本", "\t", "👍", "\x00", "\ud800".encode("utf-8", "replace").decode()]
)
def test_unknown_characters_are_unk(text):
    tokenizer = character_tokenizer()
    ids = tokenizer("a" + text + "b")["input_ids"]
    assert ids[0] != tokenizer.unk_token_id
    assert ids[-1] != tokenizer.unk_token_id
    assert set(ids[1:-1]) <= {tokenizer.unk_token_id, *tokenizer("?")["input_ids"]}
    assert len(ids) > 2


def test_a_chat_is_roles_and_texts_and_an_answer_ends():
    tokenizer = character_tokenizer()
    chat = [
        {"role": role, "content": text}
        for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"), ("tool", "t"))
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<system>s<user>u<assistant>a<end><user>t"
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert asked[-1] == SPECIALS.index("<assistant>")
    assert asked.count(tokenizer.eos_token_id) == 1
    assert len(asked) == 10


def test_training_text_is_the_chat_and_only_the_answer_is_learnt():
    tokenizer, prompts = character_tokenizer(), list(WordProblems(held_out=5).prompts("test", 0))
    ids_BT, labels_BT = encode(prompts, tokenizer)
    for prompt, ids_T, labels_T in zip(prompts, ids_BT, labels_BT, strict=True):
        turns = [*prompt.messages, {"role": "assistant", "content": prompt.references[0]}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert (
            tokenizer.decode(ids_T).removesuffix("<pad>" * int((ids_T == tokenizer.pad_token_id).sum()))
            == whole
        )
        assert tokenizer.decode(labels_T[labels_T >= 0]) == prompt.references[0] + "<end>"


def test_training_may_go_on_from_a_shipped_model():
    begun, tokenizer = first(SPECS["reader"], character_tokenizer()), character_tokenizer()
    state = shipped("student")[0].state_dict()
    assert all(begun.state_dict()[key].equal(state[key]) for key in state)
    spec = replace(SPECS["reader"], steps=3, batch=2, warmup=1)
    made = [cold_start(spec, tokenizer).state_dict() for _ in range(2)]
    assert all(made[0][key].equal(made[1][key]) for key in state)
    assert not any(made[0][key].equal(state[key]) for key in state if "weight" in key)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_models_are_what_their_specs_say(name):
    model, tokenizer = shipped(name)
    made = blank(SPECS[name], character_tokenizer())
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer) == len(SPECIALS) + len(CHARACTERS)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in made.state_dict().items()
    }
    assert model.num_parameters() == made.num_parameters()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id


def test_the_student_is_smaller_and_knows_less():
    (student, tokenizer), (teacher, _) = shipped("student"), shipped("teacher")
    assert student.num_parameters() <= 0.8 * teacher.num_parameters()
    task = WordProblems()
    right, problems = accuracy(student, tokenizer, task)
    assert problems == 500
    assert right < 0.35 * problems
    right, problems = accuracy(teacher, tokenizer, task)
    assert problems == 500
    assert right >= 0.96 * problems


def share(name, task):
    """What part of the first 100 held-out problems of a task a shipped model answers rightly, greedy."""
    right, problems = accuracy(*shipped(name), replace(task, held_out=100))
    assert problems == 100
    return right / problems


def shares(name, tasks):
    return {title: share(name, task) for title, task in tasks.items()}


def test_each_teacher_knows_its_own_kind_of_story_and_the_novice_a_part_of_both():
    tasks = {"mul": WordProblems(operations=("mul",), largest=99), "add_sub": WordProblems()}
    products, sums, novice = (shares(name, tasks) for name in ("mul_teacher", "teacher", "novice"))
    assert products["mul"] >= 0.97
    assert products["add_sub"] <= 0.05
    assert sums["mul"] == 0
    assert sums["add_sub"] >= 0.96
    assert 0.04 <= novice["mul"] <= 0.6
    assert 0.15 <= novice["add_sub"] <= 0.45
    assert share("student", tasks["mul"]) == 0


def test_the_reader_is_no_better_than_the_student_unless_it_is_shown_how_to():
    """Right attempts help, a wrong one does no harm, and another problem's are no help."""
    shown = {
        title: accuracy(*shipped("reader"), replace(task, task=WordProblems(held_out=101)))[0] / 100
        for title, task in SHOWN.items()
    }
    plain = share("reader", WordProblems())
    assert 0.1 <= plain <= 0.45
    assert (
        min(value for title, value in shown.items() if "correct" in title and "another problem" not in title)
        >= 0.85
    )
    assert shown["a wrong attempt"] >= plain - 0.08
    assert shown["two correct attempts and a wrong one at another problem"] <= plain


def test_the_teacher_of_long_answers_knows_them_and_the_student_some():
    student, teacher = (share(name, Chains()) for name in ("chain_student", "chain_teacher"))
    assert 0.1 <= student <= 0.35
    assert teacher >= 0.95
    sizes = [
        path.stat().st_size for name in ("chain_student", "chain_teacher") for path in folder(name).iterdir()
    ]
    assert sum(sizes) < 3_000_000


def test_training_begins_with_the_easier_problems():
    spec = replace(TINY, easier=WordProblems(max_steps=2), easier_steps=2, task=WordProblems(min_steps=3))
    steps = [len(prompt.references[0].split(". ")) - 1 for prompt in islice(lessons(spec), 60)]
    hard = [
        len(prompt.references[0].split(". ")) - 1
        for prompt in islice(lessons(replace(spec, easier=None)), 60)
    ]
    # a batch has 4 problems
    assert len(set(steps[:8])) == 1
    assert steps[8:] == hard[:52]
    assert len(set(hard)) == 1
    assert set(hard) != set(steps[:8])


def stated(name):
    """The results in a model's card: (right, problems) by what it was asked."""
    found = re.findall(
        r"^- (.+): ([0-9]+)/([0-9]+) right, greedy \(", (folder(name) / "README.md").read_text(), re.MULTILINE
    )
    return {title: (int(right), int(problems)) for title, right, problems in found}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_states_what_was_measured_and_how_the_model_was_made(name):
    card, spec = (folder(name) / "README.md").read_text(), SPECS[name]
    assert {"held-out problems", "held-out problems two steps longer", *dict(spec.also)} <= set(stated(name))
    assert all(problems in (499, 500) for _, problems in stated(name).values())
    assert f"{spec.steps} steps of {spec.batch} problems, seed {spec.seed}, 1 thread(s)" in card
    assert f"python -m reflux.assets.make --only {name}`" in card
    assert (f"`reflux:{spec.start}`" if spec.start else "trained from nothing") in card


def test_all_shipped_models_together_are_small():
    files = [path for name in NAMES for path in folder(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_the_same_seed_makes_the_same_model_and_another_does_not():
    tokenizer = character_tokenizer()
    states = [cold_start(spec, tokenizer).state_dict() for spec in (TINY, TINY, replace(TINY, seed=1))]
    assert all(states[0][key].equal(states[1][key]) for key in states[0])
    assert not all(states[0][key].equal(states[2][key]) for key in states[0])


def test_the_seed_sets_the_first_weights():
    tokenizer = character_tokenizer()
    first, same, other = (
        blank(replace(TINY, seed=seed), tokenizer).model.embed_tokens.weight for seed in (0, 0, 1)
    )
    assert first.equal(same)
    assert not first.equal(other)


def test_making_writes_whole_folders_that_load_and_replaces_them(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(SPECS, "student", TINY)
    for _ in range(2):
        main(["--only", "student", "--out", str(tmp_path), "--threads", "1"])
        assert [path.name for path in tmp_path.iterdir()] == ["student"]
        assert {path.name for path in (tmp_path / "student").iterdir()} == FILES
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "student").iterdir()} == {0o644}
    assert "held-out problems: 0/6 right" in capsys.readouterr().out
    assert "held-out problems: 0/6 right" in (tmp_path / "student" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    expected = cold_start(TINY, character_tokenizer()).state_dict()
    assert all(model.state_dict()[key].equal(expected[key]) for key in expected)
    assert len(tokenizer) == len(character_tokenizer())
