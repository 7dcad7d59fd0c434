"""Data sets that other people published and that are read here: where they are, under which terms, and what to cite.

A licence that is not known here is said to be not known, which is no permission: the terms are those of the source.
"""

from dataclasses import dataclass

from palate.data.recipes import RECIPES, usage
from palate.errors import DataError


@dataclass(frozen=True)
class Published:
    """A data set that other people published.

    Attributes:
        name: what `palate data get` calls it.
        what: one line.
        repo: its id among the data sets of the Hugging Face Hub; None where it has to be fetched by hand.
        files: patterns of the files that the loader reads.
        revision: branch or tag that is asked for where nothing is recorded yet.
        page: where it is described, or what to look for.
        licence: as far as it is known; "not known here" is no permission.
        citation: what to cite.
        users, size: as published, or "not known".
        loader: what reads it here.
        recipes: what `palate data prepare` calls it, one name for each published split.
    """

    name: str
    what: str
    repo: str | None
    files: tuple[str, ...]
    revision: str
    page: str
    licence: str
    citation: str
    users: str
    size: str
    loader: str
    recipes: tuple[str, ...] = ()

    @property
    def reader(self) -> str:
        """What its files are given to: the recipes at the command line, and the loader."""
        if not self.recipes:
            return self.loader
        return f"`palate data prepare` ({' or '.join(self.recipes)}), or in Python to {self.loader}"


_ASK = "not known here: read the terms on its page before you use it"
_TABLES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.csv")

PUBLISHED: tuple[Published, ...] = (
    Published(
        "prism",
        "people of 75 countries and what they chose in conversations with language models",
        "HannahRoseKirk/prism-alignment",
        ("conversations.jsonl", "survey.jsonl"),
        "main",
        "https://huggingface.co/datasets/HannahRoseKirk/prism-alignment",
        "people's words CC-BY-4.0, models' answers CC-BY-NC-4.0",
        "Kirk et al. 2024, The PRISM Alignment Project",
        "1,286 with 6 conversations or more",
        "not known",
        "palate.data.prism.load_prism, prism_split",
        ("prism-mrm", "prism-lore-paper", "prism-lore-corrected"),
    ),
    Published(
        "tldr",
        "which of two summaries of a Reddit post is better, by workers who each judged many",
        "openai/summarize_from_feedback",
        ("comparisons/*.parquet", "comparisons/*.jsonl", "comparisons*.json*"),
        "refs/convert/parquet",
        "https://huggingface.co/datasets/openai/summarize_from_feedback",
        _ASK,
        "Stiennon et al. 2020, Learning to summarize from human feedback",
        "40 workers with 50 annotations or more",
        "not known",
        "palate.data.tldr.load_tldr, load_tldr_paper, load_tldr_lore",
        ("tldr-mrm", "tldr-paper", "tldr-lore"),
    ),
    Published(
        "personalllm",
        "eight answers to every prompt with ten reward models' scores; the users are simulated from them",
        "namkoong-lab/PersonalLLM",
        _TABLES,
        "main",
        "https://huggingface.co/datasets/namkoong-lab/PersonalLLM",
        _ASK,
        "Zollo et al. 2024, PersonalLLM",
        "simulated; 9,402 prompts to learn from, 1,000 to test on",
        "not known",
        "palate.data.personalllm.load_personalllm, then best_and_worst or two_at_random",
        ("personalllm-lore", "personalllm-random"),
    ),
    Published(
        "arena-personal",
        "PersonalRewardBench: people of Chatbot Arena, questions on which they can differ, split",
        "MichaelR207/chatbot_arena_personalized_0125",
        _TABLES,
        "main",
        "https://huggingface.co/datasets/MichaelR207/chatbot_arena_personalized_0125",
        _ASK,
        "Ryan et al. 2025, SynthesizeMe (arXiv 2506.05598)",
        "131",
        "not known",
        "palate.data.arena.load_arena",
        ("arena",),
    ),
    Published(
        "prism-personal",
        "PersonalRewardBench: people of PRISM, questions on which they can differ, split",
        "MichaelR207/prism_personalized_0125",
        _TABLES,
        "main",
        "https://huggingface.co/datasets/MichaelR207/prism_personalized_0125",
        "that of PRISM for its texts (CC-BY-4.0, models' answers CC-BY-NC-4.0); its own terms are not known here",
        "Ryan et al. 2025, SynthesizeMe (arXiv 2506.05598); Kirk et al. 2024",
        "723",
        "not known",
        "palate.data.arena.load_arena",
        ("arena",),
    ),
    Published(
        "community-alignment",
        "annotators of five countries mark the best of four answers, in conversations of up to four turns and five languages",
        "facebook/community-alignment-dataset",
        ("*.csv", "*.parquet"),
        "main",
        "https://huggingface.co/datasets/facebook/community-alignment-dataset",
        "CC-BY-4.0",
        "Community Alignment (arXiv 2507.09650)",
        "more than 3,000, most with 26 conversations or more",
        "more than 200,000 marks",
        "palate.data.community.load_community_alignment",
        ("community-alignment",),
    ),
    Published(
        "pref-personas",
        "simulated personas compare an answer with its revision",
        None,
        (),
        "",
        "the shared folder that the code of PReF (arXiv 2503.06358) points to",
        _ASK,
        "PReF (arXiv 2503.06358)",
        "simulated",
        "not known",
        "palate.data.personas.load_personas",
        ("personas",),
    ),
    Published(
        "polis-ssis",
        "404 people vote on 293 short statements",
        None,
        (),
        "",
        "the folder of the ssis conversation in github.com/compdemocracy/openData",
        "CC-BY-4.0. Data was gathered using the Polis software (compdemocracy.org/polis) and is sub-licensed under CC BY 4.0 "
        "with Attribution to The Computational Democracy Project.",
        "The Computational Democracy Project",
        "404",
        "210 kB",
        "palate.load_pairs or load_polis, of the folder with comments.csv and participants-votes.csv",
    ),
)


def published(name: str) -> Published:
    """The data set of this name. Raises `DataError` for any other, which says what to run where it is a recipe's."""
    for one in PUBLISHED:
        if one.name == name:
            return one
    asked = [name] if name in RECIPES else [recipe for recipe in RECIPES if recipe.startswith(f"{name}-")]
    if asked:
        raise DataError(f"{name!r} is prepared, not fetched; run: {', or '.join(map(_how, asked))}")
    raise DataError(f"there is no data set {name!r}; expected one of {', '.join(one.name for one in PUBLISHED)}")


def _how(recipe: str) -> str:
    """The command of a recipe, and where its files come from as far as they are published."""
    sources = [f"`palate data get {one.name}`" for one in PUBLISHED if recipe in one.recipes and one.repo]
    return f"`{usage(recipe)}`" + (f" with the files of {' or '.join(sources)}" if sources else "")
