"""Train a small LLaMA from scratch on invented facts: a model with something to lose.

On random weights nothing about quality can fail. This script makes a small model on which pruning, adapters and stages
show: a LLaMA of ordinary architecture (12 layers, grouped-query attention, its own byte-level BPE tokenizer) that knows
a few hundred facts about invented people, cities and countries, and answers them closed-book in the one format that
every script of this project uses:

    Question: Where was Mira Tolvane born?
    Answer: Keldravik</s>

Everything is generated from a seed; nothing is downloaded. Two CPU cores need about two minutes.

    python demo/train_demo_llama.py                         # writes demo/model
    python demo/train_demo_llama.py OUT --facts 200 --layers 16
    python demo/train_demo_llama.py --force                 # replaces an existing demo/model

Writes OUT, whole or not at all (a temporary sibling, renamed at the end), an ordinary Hugging Face checkpoint:

    config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja
    facts/train.json         SQuAD v1.1 format: a paragraph for each subject, every trained question of each fact
    facts/validation.json    TriviaQA format with aliases: each fact once, in its first trained wording
    facts/paraphrases.json   TriviaQA format: the same facts in wordings that training never saw
    facts/calibration.txt    the training documents, one a line (the newline before "Answer:" written as a space)
    facts/report.json        exact match on validation and paraphrases, training arguments, versions

Exit status: 0 if greedy exact match on facts/validation.json reaches --min-em, 1 if not, 2 for a usage error.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ---- constants --------------------------------------------------------------------------------------

PROMPT = "Question: {question}\nAnswer:"
# Renders the last user message in the trained format. It writes <s> itself: chat endpoints tokenise a rendered template
# without special tokens.
CHAT_TEMPLATE = "{{ bos_token }}Question: {{ messages[-1]['content'] }}\nAnswer:"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_ANSWER_TOKENS = 10
MAX_POSITIONS = 2048
# Each layer starts by writing this much more into the residual stream than the one before. So few facts fit into the
# first layers: with 1.0, exact match stays 1.00 without layers 8-10 of 12, and there is nothing to lose. With 1.3 it
# falls to 0.30, with 1.45 to 0.06. At 1.3 the least angular distance lies in the deep layers, as in real models.
RESIDUAL_GROWTH = 1.3
VOCAB_SIZE = 2048  # at most; BPE stops earlier once every word is one token

THREADS = 2  # the matrices are too small for more, and a fixed number makes a run repeatable

ONSETS = "b br d dr f g gr h k kr l m n p r s st t th tr v z".split()
VOWELS = "a e i o u ae ia".split()
CODAS = "l n r s th x lk nd rn".split()
MONTHS = "January February March April May June July August September October November December".split()
PROFESSIONS = {
    "astronomer": ["stargazer"],
    "baker": ["bread baker"],
    "beekeeper": ["apiarist"],
    "botanist": ["plant scientist"],
    "carpenter": ["woodworker"],
    "clockmaker": ["watchmaker"],
    "composer": ["writer of music"],
    "fisher": ["fisherman"],
    "glassblower": ["glass blower"],
    "judge": ["magistrate"],
    "painter": ["artist"],
    "physician": ["doctor"],
    "poet": ["writer of poems"],
    "potter": ["ceramicist"],
    "sailor": ["seafarer"],
    "weaver": ["cloth maker"],
}

# ---- data classes -----------------------------------------------------------------------------------


class UsageError(Exception):
    """A mistake of the user's: main() prints it and returns 2."""


@dataclass(frozen=True)
class Relation:
    """The wordings of one kind of fact; {subject} and {answer} are filled in."""

    questions: tuple[str, ...]  # trained; the first is the one in validation.json
    paraphrases: tuple[str, ...]  # held out
    statements: tuple[str, ...]  # trained; the first is the one in the SQuAD paragraphs


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    answer: str
    aliases: tuple[str, ...]  # further accepted answers, without `answer` itself


RELATIONS = {
    "birthplace": Relation(
        questions=(
            "Where was {subject} born?",
            "In which city was {subject} born?",
            "What is the birthplace of {subject}?",
        ),
        paraphrases=("Which city is the birthplace of {subject}?", "In what place was {subject} born?"),
        statements=("{subject} was born in the city of {answer}.", "The birthplace of {subject} is {answer}."),
    ),
    "birth year": Relation(
        questions=(
            "When was {subject} born?",
            "In which year was {subject} born?",
            "What is the birth year of {subject}?",
        ),
        paraphrases=("In what year was {subject} born?", "Which year is the birth year of {subject}?"),
        statements=("{subject} was born in the year {answer}.", "The birth year of {subject} is {answer}."),
    ),
    "profession": Relation(
        questions=(
            "What was the profession of {subject}?",
            "What did {subject} do for a living?",
            "Which profession did {subject} have?",
        ),
        paraphrases=("What profession did {subject} have?", "Which was the profession of {subject}?"),
        statements=("{subject} worked as a {answer}.", "The profession of {subject} was {answer}."),
    ),
    "river": Relation(
        questions=(
            "Which river flows through {subject}?",
            "On which river does {subject} lie?",
            "What is the river of {subject}?",
        ),
        paraphrases=("What river flows through {subject}?", "Through {subject} flows which river?"),
        statements=("The river that flows through {subject} is the {answer}.", "{subject} lies on the river {answer}."),
    ),
    "founder": Relation(
        questions=(
            "Who founded {subject}?",
            "Who was the founder of {subject}?",
            "By whom was {subject} founded?",
        ),
        paraphrases=("Which person founded {subject}?", "Who is known as the founder of {subject}?"),
        statements=("{subject} was founded by {answer}.", "The founder of {subject} was {answer}."),
    ),
    "feast": Relation(
        questions=(
            "When is the feast of {subject}?",
            "On which day does {subject} hold its feast?",
            "What is the date of the feast of {subject}?",
        ),
        paraphrases=("On what day is the feast of {subject}?", "Which day is the feast of {subject}?"),
        statements=("{subject} holds its feast on {answer}.", "The feast of {subject} is on {answer}."),
    ),
    "capital": Relation(
        questions=(
            "What is the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "What is the name of the capital of {subject}?",
        ),
        paraphrases=("Name the capital of {subject}.", "What city is the capital of {subject}?"),
        statements=("The capital of {subject} is {answer}.", "{subject} has its capital in {answer}."),
    ),
}

# ---- facts ------------------------------------------------------------------------------------------


def invent_names(rng: random.Random, count: int, taken: set[str], syllables: int) -> list[str]:
    """Returns `count` new pronounceable names and adds them to `taken`."""
    names: list[str] = []
    while len(names) < count:
        open_syllables = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables))
        name = (open_syllables + rng.choice(CODAS)).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def city_aliases(city: str) -> tuple[str, ...]:
    return (f"the city of {city}", f"{city} City")


def invent_facts(count: int, seed: int) -> list[Fact]:
    """Returns `count` facts, no (relation, subject) twice: ten for each country, its capital and two people."""
    rng = random.Random(seed)
    units = math.ceil(count / 10)
    taken: set[str] = set()
    cities = invent_names(rng, units, taken, 2)
    countries = [name + "ia" for name in invent_names(rng, units, taken, 2)]
    rivers = invent_names(rng, units, taken, 1)
    given = invent_names(rng, max(4, units // 2), taken, 1)
    people = [f"{rng.choice(given)} {family}" for family in invent_names(rng, 3 * units, taken, 2)]
    facts = []
    for i, (city, country, river) in enumerate(zip(cities, countries, rivers, strict=True)):
        founder, *citizens = people[3 * i : 3 * i + 3]
        for person in citizens:
            home, year, profession = rng.choice(cities), str(rng.randint(1200, 1899)), rng.choice(list(PROFESSIONS))
            facts.append(Fact("birthplace", person, home, city_aliases(home)))
            facts.append(Fact("birth year", person, year, (f"the year {year}", f"{year} AD")))
            facts.append(Fact("profession", person, profession, tuple(PROFESSIONS[profession])))
        day, month = rng.randint(1, 28), rng.choice(MONTHS)
        facts.append(Fact("river", city, river, (f"River {river}", f"{river} River")))
        facts.append(Fact("founder", city, founder, (founder.split()[1],)))
        facts.append(Fact("feast", city, f"{day} {month}", (f"{month} {day}", f"{day} of {month}")))
        facts.append(Fact("capital", country, city, city_aliases(city)))
    return facts[:count]


def training_documents(facts: list[Fact]) -> list[tuple[str, str]]:
    """Returns (prompt, completion) pairs: the trained questions of each fact, and its statements with no prompt."""
    documents = []
    for fact in facts:
        relation = RELATIONS[fact.relation]
        for question in relation.questions:
            documents.append((PROMPT.format(question=question.format(subject=fact.subject)), f" {fact.answer}"))
        for statement in relation.statements:
            documents.append(("", statement.format(subject=fact.subject, answer=fact.answer)))
    return documents


def squad_json(facts: list[Fact]) -> dict:
    """The facts in the format of SQuAD v1.1: one article and paragraph a subject, `answer_start` in characters."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    articles = []
    for subject, known in by_subject.items():
        context, qas = "", []
        for fact in known:
            relation = RELATIONS[fact.relation]
            context += " " if context else ""
            start = len(context) + len(relation.statements[0].split("{answer}")[0].format(subject=subject))
            context += relation.statements[0].format(subject=subject, answer=fact.answer)
            for i, question in enumerate(relation.questions):
                qas.append(
                    {
                        "id": f"{fact.relation}/{subject}/{i}".replace(" ", "_"),
                        "question": question.format(subject=subject),
                        "answers": [{"text": fact.answer, "answer_start": start}],
                    }
                )
        articles.append({"title": subject, "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": articles}


def normalize_answer(text: str) -> str:
    """TriviaQA's own normalisation (triviaqa_evaluation.py): lower case, no punctuation, no articles, single spaces."""
    text = text.replace("_", " ").lower()
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def triviaqa_json(facts: list[Fact], held_out: bool) -> dict:
    """The facts in TriviaQA's format: the first trained wording of each, or all the held-out ones."""
    rows = []
    for fact in facts:
        relation = RELATIONS[fact.relation]
        aliases = [fact.answer, *fact.aliases]
        for i, question in enumerate(relation.paraphrases if held_out else relation.questions[:1]):
            rows.append(
                {
                    "Question": question.format(subject=fact.subject),
                    "QuestionId": f"{fact.relation}/{fact.subject}/{'p' if held_out else ''}{i}".replace(" ", "_"),
                    "QuestionSource": "train_demo_llama.py",
                    "Answer": {
                        "Value": fact.answer,
                        "Aliases": aliases,
                        "NormalizedValue": normalize_answer(fact.answer),
                        "NormalizedAliases": sorted({normalize_answer(alias) for alias in aliases}),
                        "Type": "FreeForm",
                    },
                }
            )
    return {"Data": rows, "Domain": "Invented", "VerifiedEval": False, "Version": 1.0}


# ---- tokenizer and model ----------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`. It puts <s> first, as LLaMA's does; the rule is in tokenizer.json, for vLLM."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],  # a LLaMA refuses the default's token_type_ids
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """A LLaMA with random weights, whose late layers weigh as much in the residual stream as the early ones.

    head_dim 32 is the smallest that vLLM's CPU attention takes.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= RESIDUAL_GROWTH**i
            layer.mlp.down_proj.weight *= RESIDUAL_GROWTH**i
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


# ---- training and evaluation ------------------------------------------------------------------------


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[tuple[str, str]]) -> list[tuple[list, list]]:
    """Returns (token ids, labels) a document; a question's labels are -100, so the loss sees its answer and </s>."""
    encoded = []
    for prompt, completion in documents:
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        encoded.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
    return encoded


def endless_batches(examples: list, size: int, rng: random.Random) -> Iterator[list]:
    """Yields batches of `size` examples; every example comes once before any comes again."""
    pool: list = []
    while True:
        while len(pool) < size:
            pool += rng.sample(examples, len(examples))
        batch, pool = pool[:size], pool[size:]
        yield batch


def pad_right(rows: list[list[int]], value: int) -> torch.Tensor:
    """Returns [len(rows), longest]; padding on the right needs no mask, since attention is causal."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def train(model: LlamaForCausalLM, examples: list[tuple[list, list]], args: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine decay to zero, in float32, `args.steps` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warmup = max(1, args.steps // 20)
    batches = endless_batches(examples, args.batch, random.Random(args.seed))
    model.train()
    progress = tqdm(range(args.steps), desc="training", unit="step", mininterval=1.0)
    for step in progress:
        decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / warmup, decay)
        ids, labels = zip(*next(batches), strict=True)
        loss = model(
            input_ids=pad_right(ids, model.config.pad_token_id), labels=pad_right(labels, -100), use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, triviaqa: dict, batch: int = 128) -> float:
    """The share of questions whose greedy answer, normalised, is one of the accepted answers."""
    model.eval()
    rows, correct = triviaqa["Data"], 0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        prompts = [PROMPT.format(question=row["Question"]) for row in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        outputs = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for row, answer in zip(chunk, answers, strict=True):
            correct += normalize_answer(answer.split("\n")[0]) in row["Answer"]["NormalizedAliases"]
    return correct / len(rows)


# ---- output -----------------------------------------------------------------------------------------


def write_checkpoint(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, files: dict[str, str], force: bool
) -> None:
    """Writes the checkpoint and facts/`files` into a temporary sibling of `out` and renames it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as scratch:
        staged = Path(scratch) / "staged"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / "facts").mkdir()
        for name, text in files.items():
            (staged / "facts" / name).write_text(text, encoding="utf-8")
        if force and out.exists():
            os.rename(out, Path(scratch) / "replaced")
        os.rename(staged, out)


def describe_run(args: argparse.Namespace, model: LlamaForCausalLM) -> dict:
    """What the result depends on: the arguments that shape it, the size, the versions."""
    return {
        "parameters": model.num_parameters(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "force")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def to_json(value: dict) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# ---- command line -----------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small LLaMA from scratch on invented facts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("demo/model"), metavar="OUT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an existing OUT")
    parser.add_argument("--min-em", type=float, default=0.95, help="exit 1 if exact match on the facts is lower")
    group = parser.add_argument_group("facts and model")
    group.add_argument("--facts", type=int, default=300, help="number of invented facts")
    group.add_argument("--layers", type=int, default=12, help="decoder layers")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=360, help="optimizer steps")
    group.add_argument("--batch", type=int, default=64, help="documents a step")
    group.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    group.add_argument("--seed", type=int, default=0, help="seed of facts, weights and order")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raises UsageError for what would fail after minutes of training or overwrite something."""
    for name in ("facts", "layers", "steps", "batch"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: at least 1 is needed")
    if args.out.exists() and not args.force:
        raise UsageError(f"{args.out} exists already; replace it with --force, or name another folder")
    if args.out.exists() and not (args.out / "facts").is_dir():
        raise UsageError(f"--force: {args.out} was not written by this script (it has no facts/); remove it yourself")


def main() -> int:
    args = parse_args()
    try:
        check_args(args)
    except UsageError as error:
        print(f"train_demo_llama.py: error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)

    facts = invent_facts(args.facts, args.seed)
    documents = training_documents(facts)
    validation, paraphrases = triviaqa_json(facts, held_out=False), triviaqa_json(facts, held_out=True)
    texts = [prompt + completion for prompt, completion in documents]
    tokenizer = train_tokenizer(texts)
    model = build_model(tokenizer, args.layers)
    train(model, encode_documents(tokenizer, documents), args)
    model.to(torch.bfloat16)  # as it is served; what follows measures that

    report = {
        "em_validation": exact_match(model, tokenizer, validation),
        "em_paraphrases": exact_match(model, tokenizer, paraphrases),
        "seconds": round(time.monotonic() - started, 1),
    } | describe_run(args, model)
    files = {
        "train.json": to_json(squad_json(facts)),
        "validation.json": to_json(validation),
        "paraphrases.json": to_json(paraphrases),
        "calibration.txt": "".join(text.replace("\n", " ") + "\n" for text in texts),
        "report.json": to_json(report),
    }
    write_checkpoint(args.out, model, tokenizer, files, args.force)
    print(f"{args.out}: {report['parameters'] / 1e6:.1f} M parameters in {report['seconds']:.0f} s; exact match")
    print(f"{report['em_validation']:.3f} on the facts, {report['em_paraphrases']:.3f} on held-out paraphrases")
    if report["em_validation"] < args.min_em:
        message = f"exact match {report['em_validation']:.3f} is below {args.min_em}; train longer: --steps, --force"
        print(f"train_demo_llama.py: error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
