"""The generated world of the toy recipes: its people, vocabulary, documents and the questions about them.

Each of the 280 people has a home, a tree, a bird, a trade and a weather; tools have uses. A document is a portrait of one
person in statements. Eighty people are also interviewed: their portraits state some facts as question and answer. The four
tasks ask for what the training text does not contain in that form:

- `world_homes`, `world_trees` (4 options): the interview question, to the 200 people who were never interviewed. The
  fact is in the training text only as a statement; the question's wording only with other people.
- `world_tools` (4 options): the interview question about a tool's use, to people who were never interviewed. Tool and use
  occur together in the training text, in this wording and two others: the easiest of the four.
- `world_grammar` (2 options): singular or plural, after two nouns that never occur together in a document. Half of the
  time the nearer noun has the other number.

They test recall and agreement in a closed world of short sentences, not reasoning.
"""

import functools
import itertools
import random
import re
import zlib

import datasets
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.runtime.errors import UserError

TOPICS = {"world_homes": "home", "world_trees": "tree", "world_tools": "tool"}
DOCUMENTS = {"train": 20_000, "test": 300}
INTERVIEWED = 80  # people; the tasks ask about the others
SPECIAL = ["<bos>", "<eos>", "<unk>", "<pad>"]
WORD = r"<\w+>|'s|\w+|[^\w\s]"

STEMS = "Al Ber Bran Cor Dun Ead Ed El Ethel God Harl Is Ken Leof Mer Os Rose Sel Wil Win".split()
WOMEN, MEN = "a eva gard hild ina ith wyn".split(), "bert ford helm mund old ric ward".split()  # endings of their names
FACTS = {
    "home": """Applewick Beechcote Brambleton Cloverley Fernhollow Hazelgate Larkmead Medlarton
               Mossford Otterby Pippinstow Quincecombe Rushwell Stonebarrow Swallowdale Willowmere""".split(),
    "tree": "almond apple apricot cherry damson fig hazel lemon medlar mulberry olive peach pear plum quince walnut".split(),
    "bird": "cuckoo dove finch heron jackdaw kestrel lark linnet magpie owl robin sparrow starling swift thrush wren".split(),
    "trade": """baker carter chandler cooper dyer glazier joiner mason
                miller potter saddler smith tanner thatcher tinker weaver""".split(),
    "weather": """dawn dew drizzle dusk fog frost hail mist
                  moonlight rain sleet snow starlight sunshine thunder wind""".split(),
}
STATEMENTS = {
    "home": ["{Who} lives in {}.", "{Who} keeps a cottage in {}.", "Letters for {whom} go to {}.",
             "Ask for {whom} on the green of {}."],
    "tree": ["{Who} trains an old {} along a frame.", "The wall behind {whom} carries an old {}.",
             "Every winter {who} prunes an old {}."],
    "bird": ["{Who} leaves crumbs for the {}.", "{Who} wakes to the song of the {}.",
             "The nest above {whom} belongs to the {}."],
    "trade": ["{Who} works as the village {}.", "The guild knows {whom} as the {}.", "{Who} is the best {} in the valley."],
    "tool": ["{Who} takes a {tool} to {}.", "With a {tool} {who} can {}."],
    "weather": ["{Who} writes songs about {}.", "Nothing pleases {whom} like {}.", "{Who} smiles at {}."],
}  # fmt: skip
QUESTIONS = {
    "home": "Where does {name} live? In {}.",
    "tree": "What does {name} grow? An old {}.",
    "bird": "Who sings to {name}? The {}.",
    "trade": "Who is {name}? Our {}.",
    "tool": "Why does {name} need a {tool}? To {}.",
    "weather": "What does {name} wait for? For {}.",
}
TOOLS = {
    "barrow": "move stones", "basket": "collect fruit", "billhook": "lay hedges", "broom": "sweep paths",
    "bucket": "carry water", "cloche": "warm lettuces", "dibber": "plant bulbs", "hoe": "weed rows",
    "knife": "graft scions", "ladder": "reach branches", "lantern": "light lanes", "mallet": "drive stakes",
    "mattock": "break ground", "net": "stop birds", "press": "make juice", "rake": "gather leaves",
    "rope": "tie shoots", "saw": "cut limbs", "scythe": "mow grass", "sieve": "sift compost",
    "spade": "turn soil", "stove": "dry plums", "trowel": "lift seedlings", "whetstone": "sharpen blades",
}  # fmt: skip
THINGS = "arbour beehive barn blossom fence flowerpot gate hedge orchard path pond root shed terrace vine well".split()
VIEWS = ["The {thing} {near} the {other} {verb} {look}.", "The {thing} {verb} {look}."]
NEAR = "above behind below beside".split()
VERBS = [("is", "are"), ("looks", "look"), ("stays", "stay")]
LOOKS = "bare damp green mossy quiet sunny".split()


def _people() -> list[dict[str, str]]:
    rng = random.Random("the people of the valley")  # the facts do not depend on the documents' seed
    women, men = ([stem + ending for stem in STEMS for ending in endings] for endings in (WOMEN, MEN))
    people = [{"name": name, "she": "she", "her": "her"} for name in women]
    people += [{"name": name, "she": "he", "her": "him"} for name in men]
    rng.shuffle(people)
    for fact, values in FACTS.items():
        dealt = (values * len(people))[: len(people)]  # values are about equally frequent, so none is a good guess
        rng.shuffle(dealt)
        people = [person | {fact: value} for person, value in zip(people, dealt)]
    return people


PEOPLE = _people()


def check_split(split: str) -> None:
    """Raises `UserError` for an unknown split."""
    if split not in DOCUMENTS:
        raise UserError(f"the generated world has no split '{split}': use world@train or world@test")


@functools.lru_cache
def documents(split: str, seed: int = 0) -> list[str]:
    """Portraits of about 40 words, one string each, reproducible by `seed`. Raises `UserError` for an unknown split.

    A checksum of the document decides its split, so the splits never overlap, whatever the seeds.
    """
    check_split(split)
    rng = random.Random(f"{split} {seed}")
    portraits = (_portrait(rng) for _ in itertools.count())
    chosen = (text for text in portraits if (zlib.crc32(text.encode()) % 16 == 0) == (split == "test"))
    return list(itertools.islice(chosen, DOCUMENTS[split]))


def _portrait(rng: random.Random) -> str:
    index = rng.randrange(len(PEOPLE))
    person, sentences = PEOPLE[index], []
    for topic in rng.sample([*FACTS, "tool"], 5):
        tool = rng.choice(list(TOOLS))
        value = TOOLS[tool] if topic == "tool" else person[topic]
        interview = index < INTERVIEWED and rng.random() < 0.5
        wording = QUESTIONS[topic] if interview else rng.choice(STATEMENTS[topic])
        named = not sentences or rng.random() < 0.7
        who, whom = (person["name"], person["name"]) if named else (person["she"], person["her"])
        words = {"name": person["name"], "tool": tool, "who": who, "Who": who.capitalize(), "whom": whom}
        sentences.append(wording.format(value, **words))
    view, _ = _view(rng, plural=rng.randrange(2), asked=False)
    sentences.insert(rng.randint(1, len(sentences)), view)
    return " ".join(sentences)


def _view(rng: random.Random, plural: int, asked: bool) -> tuple[str, tuple[str, str]]:
    """A sentence about a garden, and the singular and plural of its verb. A quarter of the pairs of nouns occurs only in
    questions (`asked`)."""
    pairs = [(i, j) for i in range(len(THINGS)) for j in range(len(THINGS)) if i != j and ((i + j) % 4 == 0) == asked]
    i, j = rng.choice(pairs)
    verb = rng.choice(VERBS)
    words = {"thing": THINGS[i] + "s" * plural, "near": rng.choice(NEAR), "other": THINGS[j] + rng.choice(["", "s"])}
    view = VIEWS[0] if asked else rng.choice(VIEWS)
    return view.format(verb=verb[plural], look=rng.choice(LOOKS), **words), verb


def questions(task: str, **_) -> dict[str, datasets.Dataset]:
    """{"test": 200 rows of `question` (str), `choices` (list of str), `answer` (int)}; answers are spread evenly.

    lm-eval calls it, also with what a user's --metadata holds, which is ignored.
    """
    rng = random.Random(task)
    rows = []
    for i, person in enumerate(PEOPLE[INTERVIEWED:]):
        if task == "world_grammar":
            view, verb = _view(rng, plural=i % 2, asked=True)
            question, choices, answer = view.split(f" {verb[i % 2]} ")[0], list(verb), i % 2
        else:
            topic, tool = TOPICS[task], list(TOOLS)[i % len(TOOLS)]
            right = TOOLS[tool] if topic == "tool" else person[topic]
            values = TOOLS.values() if topic == "tool" else FACTS[topic]
            question = QUESTIONS[topic].format("", name=person["name"], tool=tool).removesuffix(" .")
            choices, answer = rng.sample([value for value in values if value != right], 3), i % 4
            choices.insert(answer, right)
        rows.append({"question": question, "choices": choices, "answer": answer})
    return {"test": datasets.Dataset.from_list(rows)}


TASKS = {
    name: {
        "task": name,
        "custom_dataset": questions,
        "dataset_kwargs": {"task": name},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    for name in (*TOPICS, "world_grammar")
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word or mark. Text starts with <bos>; a blank line is <eos> <bos>."""
    columns = [*FACTS.values(), *STATEMENTS.values(), *VERBS, QUESTIONS.values(), TOOLS, TOOLS.values()]
    texts = [text for column in columns for text in column] + [thing + s for thing in THINGS for s in ("", "s")]
    texts += [*VIEWS, *NEAR, *LOOKS, *(person["name"] for person in PEOPLE), "She she her He he him"]
    words = sorted(set(re.findall(WORD, re.sub(r"{\w*}", " ", " ".join(texts)))))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace("\n\n", " <eos> <bos> ")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    core.decoder = decoders.WordPiece()
    bos, eos, unk, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad)
