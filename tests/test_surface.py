"""What users hold on to: verbs, names, fields and their defaults. A change here is a change for them, so it
is made on purpose.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reflux
from reflux.config.groups import GROUPS
from reflux.config.recipe import RunConfig, load_recipe
from reflux.config.registry import kinds, part

VERBS = "run plan eval report difficulty signal answers serve-oracle list cite doctor"

REGISTERED = """
samplers      hf references imported flow vllm teacher_samples
teachers      flow local self vllm
contexts      same peers privileged replay
objectives    sampled_kl divergence nll policy_gradient velocity_kl
credit        prefix position group_advantage release margin freshness balance discrepancy sign_gate unlikely
rewards       verifier environment recorded rubric discriminator judge
learners      flow fsdp hf
extrapolation  extrapolate
tasks         word_problems chains shopping calculator ledger gsm8k jsonl answered mix verifiers glyphs
evals         accuracy agreement foresight teacher_accuracy test_accuracy
cluster       ray
endpoints     openai local
schedules     constant linear cosine steps
"""

FIELDS = """
run                     task sampler learner objectives teachers={} credit={} rewards={} refresh=None extrapolation=None evals={} cluster=None track health
                        recipe='unnamed' steps=200 prompts_per_step=64 group_size=1 max_staleness=0 ahead=None order='ready' seed=0 loss_aggregation='token-mean-weighted' save_every=50
                        eval_every=50 keep_checkpoints=2 log_variance=False threads=0 skip_checks=() deterministic=False trace=False
samplers.hf             max_tokens=512 train_max_tokens=None temperature=1.0 top_p=1.0 stop=() allow_biased=False max_prompt_tokens=0
                        long_prompts='refuse' max_turns=0 environment_timeout_s=60.0 dtype='auto' batch_tokens=32768 turns='together'
                        device='auto' attention=None
samplers.vllm           max_tokens=512 train_max_tokens=None temperature=1.0 top_p=1.0 stop=() allow_biased=False max_prompt_tokens=0
                        long_prompts='refuse' max_turns=0 environment_timeout_s=60.0 dtype='auto' mode='managed' url=None token_variable=None
                        python=None transfer='file' weights_folder=None context_tokens=0 concurrency=256 timeout_s=600.0
                        start_timeout_s=900.0 restarts=3 sleep_level=1 gpu_memory=0.9 cache_gib=1.0 lora_rank=0 arguments=()
samplers.references     generate
samplers.imported       path generate prompt_tokens='rendered'
samplers.flow           steps=10 noise_level=0.7 guidance=1.0 eval_steps=40 max_denoising_steps=None pixels=0 batch_images=64 dtype='auto'
                        device='auto'
samplers.teacher_samples generate positions=10
teachers.local          model base_model=None context alias=None routes=() batch_tokens=32768 dtype='auto' device='auto' device_map=None offload=False attention=None
                        trust_remote_code=False system=None template={}
teachers.self           follow='ema' ema=0.05 step=0 context alias=None routes=() batch_tokens=32768 autocast='auto' device='auto'
                        attention=None
teachers.vllm           model url=None urls=() gives='student_topk' k=20 head=None dialect='vllm' adapter=None temperature=1.0 token_variable=None concurrency=32
                        read_timeout_s=600.0 patience_s=300.0 max_rows=8192 max_failed_share=0.1 cache=None context alias=None routes=() device='auto'
                        trust_remote_code=False system=None template={}
teachers.flow           model adapter=None context alias=None routes=() guidance=None batch_positions=64 dtype='auto' device='auto'
contexts.same
contexts.peers          successes=2 failures=1 threshold=0.5 failures_when='always' feedback='no_success' peer_tokens=4096
                        strip_thinking=False
contexts.privileged     show='answer'
contexts.replay
objectives.sampled_kl   teacher='main' coef=1.0 baseline='none' baseline_k=20 ratio='truncated' ratio_cap=5.0 clip=(0.2,0.2)
                        max_gap_nats=None
objectives.divergence   teacher='main' coef=1.0 divergence='reverse' beta=None support='full' k=100 tail='bucket' tail_floor=1e-07
                        ratio='none' ratio_cap=5.0
objectives.nll          coef=1.0
objectives.policy_gradient      coef=1.0 ratio='clip' clip=(0.2,0.2) count_dead_groups=True
objectives.velocity_kl  teacher='main' coef=1.0 scale='nats' weight='kl'
credit.prefix           length start=0 special_tokens=True
credit.position         weight
credit.group_advantage          nats=1.0 normalise_std=False std_floor=1e-06 baseline='mean'
credit.margin           delta=0.4 mode='mean' direction='spread' action='shift' level='token' threshold=0.5 student='behaviour'
                        retain=0.25 teacher='main'
credit.balance          ratio=1.0 threshold=0.5
credit.discrepancy      gamma=0.5 student='behaviour' teacher='main'
credit.sign_gate        agreeing=1.0 conflicting=0.0 threshold=0.5 student='behaviour' teacher='main'
credit.unlikely         advantage=-0.5 share=0.2 max_probability=1.0
credit.freshness        teacher='main' k=100 alpha=1.0 beta=1.0 floor=0.05 lag_power=1.0 drift='exact' rescale=False
credit.release          k=4 min_segments=8 min_side=3 min_gain=0.0 segments='sentences' rescale=True candidates='behaviour' teacher='main'
rewards.verifier        timeout_s=10.0 workers=1 weight=1.0
rewards.environment     weight=1.0
rewards.recorded        weight=1.0
rewards.rubric          judge teacher=None references=4 teacher_temperature=1.0 teacher_max_tokens=8192 teacher_timeout_s=120.0
                        rubric_temperature=0.7 rubric_max_tokens=8192 rubric_timeout_s=120.0 rubric_repairs=2
                        verdicts_temperature=0.0 verdicts_max_tokens=4096 verdicts_timeout_s=60.0 verdicts_repairs=1
                        verifier_chunk=0 rubric_per='group' blind=True max_failed_share=0.4 rubric_prompt=None verdicts_prompt=None weight=1.0
rewards.discriminator   model=None lr=1e-06 betas=(0.9,0.999) clip=0.2 warmup_steps=0 references=1 micro_batch_tokens=16384
                        gradient_checkpointing=False autocast='auto' device='auto' weight=1.0
rewards.judge           judge mode='score' temperature=0.0 max_tokens=1024 timeout_s=60.0 repairs=1 max_failed_share=0.4 prompt=None
                        weight=1.0
extrapolation.extrapolate
                        tries=5 prompts=50 samples=1 accept='better' rescore_incumbent=False score='accuracy' teacher='main'
                        max_tokens=None include=('attn','attention','mlp','ffn','.ff','feed_forward')
learners.hf             model base_model=None system=None template={} prompt_suffix=None lr=1e-06 betas=(0.9,0.999) eps=1e-08 weight_decay=0.0
                        clip=1.0 min_grad_norm=1e-06
                        micro_batch_tokens='auto' lora=None gradient_checkpointing=False compile=False autocast='auto' device='auto'
                        attention=None trust_remote_code=False
learners.fsdp           model base_model=None system=None template={} prompt_suffix=None lr=1e-06 betas=(0.9,0.999) eps=1e-08 weight_decay=0.0
                        clip=1.0 min_grad_norm=1e-06
                        micro_batch_tokens='auto' lora=None gradient_checkpointing=False compile=False autocast='auto' device='auto'
                        attention=None trust_remote_code=False
learners.flow           model lr=0.0003 betas=(0.9,0.999) eps=1e-08 weight_decay=0.0001 clip=1.0 min_grad_norm=0.001 micro_batch=64
                        adapter=None merge=None lora=None average=None gradient_checkpointing=False autocast='auto' device='auto'
tasks.glyphs            domains=('digits','counts') largest_count=6 held_out=480 weight=1.0
tasks.jsonl             path=None dataset=None dataset_config=None dataset_split='train' keys=None validation=0.05 test=None
                        instruction='' grader='math' makes='text' route=None weight=1.0
tasks.verifiers         taskset env='' settings turns=False agent='agent' validation=0.05 limit=0 route=None weight=1.0
tasks.answered          of teacher path answers=4 temperature=1.0 max_tokens=8192 timeout_s=120.0 weight=1.0
tasks.chains            held_out=500 weight=1.0 operations=('add','sub') min_steps=8 max_steps=12 largest=30 longer=0 largest_given=9 distractors=3
tasks.shopping          held_out=500 weight=1.0 delay_s=0.0 min_items=2 max_items=4 largest_price=20 drift_every=0
tasks.calculator        held_out=500 weight=1.0 delay_s=0.0 min_steps=2 max_steps=3 largest=99
tasks.ledger            held_out=500 weight=1.0 delay_s=0.0 min_entries=7 max_entries=11 largest=40
tasks.word_problems     held_out=500 weight=1.0 operations=('add','sub') min_steps=2 max_steps=3 largest=50 longer=0
evals.accuracy          problems=500 samples=0 k=None temperature=1.0 max_tokens=None split='validation' examples=8
evals.agreement         prompts=128 teacher='main' bins=24 max_tokens=None split='validation'
evals.foresight         percent=1.0 k=20 include=('attn','attention','mlp','ffn','.ff','feed_forward')
evals.teacher_accuracy  teacher='main' problems=500 max_tokens=None split='validation' examples=8
evals.test_accuracy     problems=500 max_tokens=None teacher='main' examples=0
cluster.ray             address=None samplers=0 teachers={} learner_ranks=1 cpus_per_sampler=1.0 gpus_per_sampler=0.0 cpus_per_teacher=1.0
                        gpus_per_teacher=0.0 cpus_per_rank=1.0 gpus_per_rank=0.0 strategy='PACK' object_store_mb=0 restarts=3
                        start_timeout_s=900.0
endpoints.openai        url model key_variable=None concurrency=32 requests_per_minute=1920 tokens_per_minute=0 timeout_s=120.0 tries=3
                        structured='auto' limit_key='max_tokens' prompt_price=0.0 completion_price=0.0 cache=None
endpoints.local         faults concurrency=32 timeout_s=60.0 tries=3
schedules.constant      value
schedules.linear        start stop=None increment=None warmup=0 horizon=0
schedules.cosine        peak floor=0.0 warmup=0 horizon=0
schedules.steps         values boundaries
"""


def table(text: str) -> dict[str, list[str]]:
    """Lines of a name and words; an indented line goes on."""
    found: dict[str, list[str]] = {}
    for line in text.strip("\n").split("\n"):
        if not line.startswith(" "):
            name = line.split()[0]
        found.setdefault(name, []).extend(line.split()[0 if line.startswith(" ") else 1 :])
    return found


def shown(cls: Any) -> list[str]:
    """`name=default`; a default that is a part, or none at all, leaves the name."""
    words = []
    for entry in dataclasses.fields(cls):
        default = entry.default
        if type(default).__name__ == "FieldInfo":
            # pydantic's Field(default_factory = ...)
            default = default.get_default(call_default_factory=True)  # type: ignore[union-attr]
        bare = default is dataclasses.MISSING or dataclasses.is_dataclass(default)
        words.append(entry.name if bare else f"{entry.name}={default!r}".replace(" ", ""))
    return words


def test_the_registries_hold_these_names() -> None:
    assert {group: sorted(kinds(group)) for group in GROUPS} == {
        group: sorted(names) for group, names in table(REGISTERED).items()
    }


@pytest.mark.parametrize("name", table(FIELDS))
def test_fields_and_their_defaults(name: str) -> None:
    cls = RunConfig if name == "run" else part(*name.split("."))
    assert shown(cls) == table(FIELDS)[name]


def test_the_package_offers_one_function_and_its_version() -> None:
    code = "import reflux; print(*sorted(name for name in vars(reflux) if not name.startswith('_')))"
    assert set(python(code).split()) <= {"run", "annotations", "Iterable", "Mapping", "Path", "Any"}
    assert reflux.__version__


def test_run_stays_a_function_whatever_is_imported() -> None:
    """A submodule of the same name would take its place."""
    import pkgutil

    assert callable(reflux.run)
    assert "run" not in {module.name for module in pkgutil.iter_modules(reflux.__path__)}


def test_the_command_line_has_these_verbs() -> None:
    behaviour = python(
        "import sys; sys.argv = ['reflux', '--help']; from reflux.cli.main import main; main()"
    )
    listed = [
        line.split()[0] for line in behaviour[behaviour.index("Commands") :].splitlines()[1:] if line.strip()
    ]
    assert sorted(listed) == sorted(VERBS.split())


@pytest.mark.parametrize(
    "arguments", ["--help", "run --help", "list", "list credit", "--version", "cite vopd"]
)
def test_words_come_without_torch(arguments: str) -> None:
    code = (
        f"import sys; sys.argv = ['reflux', *{arguments.split()!r}]\n"
        "from reflux.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    assert python(code).splitlines()[-1] == "HEAVY []"


def test_every_part_can_be_imported_without_torch() -> None:
    """Values are values: `reflux plan` and the graders' worker processes never pay for what only a run needs."""
    code = (
        "import sys\n"
        "from reflux.config.registry import GROUPS, kinds, part\n"
        "import reflux.checks, reflux.config.recipe, reflux.inspection.plan, reflux.cli.main, "
        "reflux.storage.files\n"
        "import reflux.storage.attempt_log, reflux.runtime.pipeline, reflux.runtime.cohorts\n"
        "for group in GROUPS:\n    for kind in kinds(group):\n        part(group, kind)\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'scipy', 'PIL', 'datasets', 'peft', 'plotly', "
        "'math_verify'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert python(code).strip() == "[]"


def test_datasets_is_quiet_without_being_imported_and_peft_is_not_imported_for_a_plain_model() -> None:
    code = (
        "import sys\n"
        "from reflux.runtime.library_logging import quiet_libraries\n"
        "from reflux.models import lora\n"
        "import torch\n"
        "quiet_libraries()\n"
        "assert len(lora.base_parameters(torch.nn.Linear(2, 2))) == 2\n"
        "assert lora._layers(torch.nn.Linear(2, 2)) == {}\n"
        "print(sorted({'datasets', 'peft'} & set(sys.modules)))\n"
        "import datasets\n"
        "print(datasets.are_progress_bars_disabled())\n"
    )
    assert python(code).split("\n")[:2] == ["[]", "True"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run nothing", "no recipe 'nothing'"),
        ("run opd stepz=3", "did you mean 'steps'"),
        ("plan opd learner.model=/no/where", "the folder /no/where does not exist"),
        ("plan rl group_size=1", "group_size >= 2"),
        ("list creditt", "did you mean 'credit'"),
        ("report /no/where", "/no/where"),
    ],
)
def test_mistakes_end_in_a_sentence_and_code_2(arguments: str, words: str) -> None:
    code = (
        f"import sys; sys.argv = ['reflux', *{arguments.split()!r}]\nfrom reflux.cli.main import main\nmain()"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert words in " ".join(ended.stderr.split())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "300"}


def python(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("recipe", "model", "expected"),
    [
        (
            "full",
            "reflux:student",
            ["reflux eval 'a b' --samples 8", "reflux run vopd", "reflux plan r base=hub"],
        ),
        (
            "vopd",
            "reflux:student",
            ["reflux eval 'a b' --samples 8", "reflux run gkd", "reflux plan r base=hub"],
        ),
        ("full", "Qwen/Qwen3-0.6B", ["reflux eval 'a b' --samples 8", "reflux list recipes"]),
    ],
)
def test_the_commands_after_a_run_are_for_its_models(recipe: str, model: str, expected: list[str]) -> None:
    from reflux.cli.run import _next

    cfg = load_recipe(recipe, {"learner.model": model})
    assert [command for command, _ in _next(Path("a b"), cfg, "r")] == expected
