"""From a configuration to what a run needs: device, model, conversation format, tools, questions.

Everything that a user can get wrong is opened here, before a run writes its first file.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, Generic, Mapping, Sequence

import torch
from tqdm import tqdm

from mmsr import attention, plan
from mmsr import model as modeling
from mmsr.chat import ANSWER, IMAGE_PAD, PROMPTS, VISION_END, VISION_START, Chat
from mmsr.config import AnyOptions, Config, EvalConfig, Options, parse
from mmsr.data import fvqa
from mmsr.data.formats import read_examples
from mmsr.data.recorded import demonstrations, recorded_turns
from mmsr.engine import Engine
from mmsr.episode import ANSWERED, Episode, Example, Turn
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.hub import resolve
from mmsr.pretrained.load import load, skeleton, stored_weights
from mmsr.reward import answer_score, score
from mmsr.rollout import Limits, Rollout, Scripts
from mmsr.search.backends import Search, open_backend
from mmsr.search.store import Budget
from mmsr.system import parallel
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.system.parallel import SINGLE, Ranks, leave, start
from mmsr.tools import Toolbox, more_tools, search_tools
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy
from mmsr.vision import image_tokens

if TYPE_CHECKING:
    from mmsr.data.teacher import Teacher

WITHOUT_TOKENS = SimpleNamespace(tokens=0)  # stands for a picture while the words around it are counted


def launch(argv: Sequence[str], kind: type[AnyOptions], program: str, run: Callable[[AnyOptions, Ranks], None]) -> None:
    """`run` a command line on every rank. What a user can mend is one line and exit status 2, an early Ctrl-C 130."""
    try:
        config = parse(argv, kind, program)
        with start(config.device, config.timeout) as ranks:
            run(config, ranks)
        leave(ranks)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before anything is finished: there is nothing to keep
        raise SystemExit(130) from None


@dataclass
class Setup(Generic[AnyOptions]):
    """The parts of a run, opened and checked."""

    config: AnyOptions
    ranks: Ranks
    dtype: torch.dtype  # of the computation; sharded weights are kept in fp32
    folder: Path  # the checkpoint that training starts from
    model: modeling.Qwen2_5_VL  # sharded over the ranks
    chat: Chat
    toolbox: Toolbox
    spending: Budget | None  # where searches cost money
    scripts: Scripts | None  # model turns to force in training
    teacher: Teacher | None = None  # who writes them, where somebody does
    world: toy.World | None = None  # where anything of the run is the toy world's
    questions: Sequence[Example] = ()  # of training
    eval_questions: Sequence[Example] = ()  # of the evaluations within training

    @cached_property
    def suppressed(self) -> torch.Tensor:
        return self.chat.suppressed_tokens(self.model.config.vocab_size).to(self.ranks.device)

    def begin_step(self, name: str) -> None:
        """What is spent on searches from now on counts under this name."""
        if self.spending:
            self.spending.begin_step(name)

    def reference(self) -> modeling.Qwen2_5_VL:
        """A frozen copy of the model as it was in the beginning."""
        return load_model(self.folder, self.dtype, self.dtype, self.ranks, self.config.shard).requires_grad_(False)

    def new_rollout(self, model: modeling.Qwen2_5_VL, temperature: float, direct: bool = False) -> Rollout:
        """A fresh rollout of `model`, whose weights are whole."""
        c = self.config
        engine = Engine(
            model, self.chat.stop_id, self.suppressed, slots=c.slots, max_tokens=c.max_tokens,
            turn_tokens=c.turn_tokens, temperature=temperature, prefill_tokens=c.micro_tokens,
        )  # fmt: skip
        return Rollout(engine, self.chat, self.toolbox, _limits(c), direct)

    def roll_out(
        self,
        examples: Sequence[Example],
        group_size: int,
        seed: tuple,
        temperature: float,
        *,
        stretch: int | None = None,
        group_ids: Sequence[int] | None = None,
        direct: bool = False,
        scripts: Scripts | None = None,
        on_done: Callable[[Episode], None] = lambda episode: None,
        attempt: Callable = lambda work, *args: work(*args),
    ) -> tuple[list[Episode], Mapping[str, float]] | None:
        """This rank's share of the examples' groups, rolled out by the present weights, and all ranks' `counts`.

        Group ids are places in `examples`, if not given. Each `stretch` is dealt by itself: what an update needs. The
        rollout is run by `attempt`; where that breaks it off and gives None on one rank, all get None.
        """
        mine = self._mine(examples, stretch or len(examples))
        ids = mine if group_ids is None else [group_ids[i] for i in mine]
        with parallel.generation(self.model) as whole, self.ranks.sync_errors():
            rollout = self.new_rollout(whole, temperature, direct)
            episodes = attempt(rollout, [examples[i] for i in mine], group_size, seed, scripts, on_done, ids)
            counts = {} if episodes is None else rollout.counts
            del rollout, whole  # with cache and graphs, which know where the weights are
        if self.ranks.max(episodes is None):
            return None
        return episodes, self.ranks.sum(counts)

    def answers(self, examples: Sequence[Example], seed: tuple, temperature: float, **how: Any) -> list[Episode] | None:
        """One scored rollout of each example of this rank's share; `how` and None as `roll_out` has them."""
        rollouts = self.roll_out(examples, 1, seed, temperature, **how)
        if rollouts is None:
            return None
        episodes, _ = rollouts
        with self.ranks.sync_errors():
            self.score(episodes)
        return episodes

    def _mine(self, examples: Sequence[Example], stretch: int) -> list[int]:
        """The examples that are this rank's. Prompts are known to balance by, answers are not."""
        c, ranks = self.config, self.ranks
        if ranks.size == 1:
            return list(range(len(examples)))
        loads = [image_tokens(e.image, c.min_pixels, c.max_pixels) + len(e.question) / 4 for e in examples]
        starts = range(0, len(examples), stretch)
        hands = [
            parallel.balanced_partition(loads[start : start + stretch], ranks.size)[ranks.rank] for start in starts
        ]
        return [start + i for start, hand in zip(starts, hands) for i in hand]

    def score(self, episodes: Sequence[Episode]) -> None:
        score(episodes, self.config.reward_rule, self.chat.well_formed)

    def drop(self) -> None:
        """Give up what tools and teacher have not begun."""
        self.toolbox.drop()
        if self.teacher:
            self.teacher.drop()


def assemble(config: Config, ranks: Ranks = SINGLE, world: toy.World | None = None) -> Setup:
    """Open everything that a training run names. Raises UserError where something is missing or wrong.

    `world`: a toy world of one's own instead of the one that `config.toy` names.
    """
    world = world or _world(config)
    files = _fetched(config, ranks)
    with ranks.sync_errors():
        questions = _questions(files.data, world, config, ranks)
        evaluation = _eval_questions(files, world, questions, ranks)
    known = {f"--data {config.data}": questions, f"--eval-data {config.eval_data or config.data}": evaluation}
    setup = _open(config, files.search, ranks, world, known)
    setup.questions, setup.eval_questions = questions, evaluation
    with ranks.sync_errors():
        if config.demonstrations:
            _imitate_file(setup)
        if config.teacher:
            setup.scripts = setup.teacher = _teacher(setup)
    setup.model.checkpoint_blocks = setup.model.visual.checkpoint_blocks = config.recompute
    setup.model.kept_blocks = plan.kept_as_fits(setup.model.config, config, *_place(ranks, setup.dtype)).keep_blocks
    return setup


def assemble_evaluation(config: EvalConfig, ranks: Ranks = SINGLE) -> tuple[Setup, dict[str, Sequence[Example]]]:
    """Open everything that an evaluation names; and its questions by data set. Raises UserError likewise."""
    world = _world(config)
    files = _fetched(config, ranks)
    with ranks.sync_errors():
        sets = {name: _evaluated(file, world, config, ranks) for name, file in zip(config.data, files.data)}
    return _open(config, files.search, ranks, world, {f"--data {name}": part for name, part in sets.items()}), sets


def _world(config: Options) -> toy.World | None:
    wanted = "toy" in (*config.datasets, config.search) or not config.model
    return toy.World(config.seed, toy.SETTINGS[config.toy]) if wanted else None


def _open(
    config: Options, search: str, ranks: Ranks, world: toy.World | None, known: Mapping[str, Sequence[Example]]
) -> Setup:
    """What training and evaluation have in common. `known`: all questions, by the option that names them."""
    dtype = getattr(torch, config.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    with ranks.sync_errors():
        engine, scripts = _search(config, search, world, list(known.values()), ranks)
    tools = search_tools(engine.backend, config.max_images, config.max_texts) + more_tools(config.tools, engine.backend)
    prompts = prompts_folder(config)  # refused before a base model is made, which takes minutes
    find = partial(resolve, config.model) if config.model else partial(toy_base.base_model, world)
    folder = ranks.main_process_first("model folder", find)
    with ranks.sync_errors():
        sizes = skeleton(folder).config  # weights that do not fit are refused before memory is counted
        chat = Chat(folder, prompts, tools)
        _check_tokens(folder, chat, sizes)
    if read_config(folder).tie_word_embeddings != sizes.tie_word_embeddings:
        ranks.print(f"{folder}: config.json ties the head to the embedding, but another head is stored: that is used.")
    for option, questions in known.items():
        _check_room(option, questions, chat, config, ranks)
    if isinstance(config, Config):
        _check_memory(config, sizes, dtype, ranks)
    model = load_model(folder, dtype, torch.float32 if ranks.size > 1 else dtype, ranks, config.shard)
    toolbox = Toolbox(tools, inline=config.deterministic)
    attention.sum_widely(config.deterministic)
    return Setup(config, ranks, dtype, folder, model, chat, toolbox, engine.spending, scripts, world=world)


def _check_tokens(folder: Path, chat: Chat, model: modeling.ModelConfig) -> None:
    """Raises UserError for a tokenizer of another model: what it writes would be read as something else."""
    chat.suppressed_tokens(model.vocab_size)
    said = {
        IMAGE_PAD: model.image_token_id,
        VISION_START: model.vision_start_token_id,
        VISION_END: model.vision_end_token_id,
    }
    for name, token_id in said.items():
        if chat.added[name] != token_id:
            where = f"{name} is {chat.added[name]} in tokenizer.json and {token_id} in config.json"
            raise UserError(f"{folder}: {where}; take both from the same checkpoint")


def prompts_folder(config: Options) -> Path:
    """The folder that --prompts means. Raises UserError where there is none."""
    folder = PROMPTS / config.prompts if config.prompts in ("toy", "real") else Path(config.prompts)
    if not folder.is_dir():
        raise UserError(f"--prompts {config.prompts}: no such folder; give toy, real or a folder with user.txt in it")
    return folder


def _check_room(option: str, questions: Sequence[Example], chat: Chat, config: Options, ranks: Ranks) -> None:
    """Say which prompts leave no room for the shortest answer. Raises UserError where all are such.

    Such a rollout ends before its first token, or within its answer: it teaches nothing, and would count as wrong in
    silence. No picture is decoded: its header tells how many tokens it takes.
    """
    answer = len(chat.assistant(f"<{ANSWER}></{ANSWER}>"))
    if config.turn_tokens < answer:
        raise UserError(f"--turn-tokens {config.turn_tokens}: the shortest answer takes {answer}; give more")
    direct = isinstance(config, EvalConfig) and config.mode == "direct"
    words = cache(lambda question: len(chat.prompt(question, WITHOUT_TOKENS, direct).ids))
    least, long = config.max_tokens, []
    with ranks.sync_errors():
        places, hidden = range(ranks.rank, len(questions), ranks.size), None if ranks.main else True
        for place in tqdm(places, desc="measuring prompts", unit="prompt", leave=False, disable=hidden):
            example = questions[place]
            length = words(example.question) + image_tokens(example.image, config.min_pixels, config.max_pixels)
            least = min(least, length)
            if length + answer > config.max_tokens:
                long.append((place, example.id))
    shares = ranks.all_gather((least, long))
    long = sorted(chain(*(long for _, long in shares)))
    if not long:
        return
    fit = f"fit --max-tokens {config.max_tokens} with a picture and an answer of {answer} tokens"
    mend = "raise --max-tokens, lower --max-pixels, or shorten the prompt"
    if len(long) == len(questions):
        raise UserError(
            f"{option}: no prompt can {fit}; the shortest takes {min(least for least, _ in shares)}; {mend}"
        )
    if ranks.main:
        ids = ", ".join(name for _, name in long[:5]) + (", …" if len(long) > 5 else "")
        some = f"{len(long)} of {len(questions)} prompts do not"
        print(
            f"WARNING: {option}: {some} {fit}: they cannot be answered and count as wrong ({ids}); {mend}",
            file=sys.stderr,
        )


def _check_memory(config: Config, model: modeling.ModelConfig, dtype: torch.dtype, ranks: Ranks) -> None:
    """Print the memory plan. Raises UserError where it does not fit, with what would help."""
    place = _place(ranks, dtype)
    found = plan.check(model, config, *place)
    whole = f"at most {found.peak / plan.GIB:.1f} of {place[0] / plan.GIB:.1f} GiB on each device"
    on_cpu = ranks.device.type != "cuda"
    ranks.print(f"Memory plan: {whole}" if on_cpu else f"{found.table()}\nMemory plan: {whole}")
    if config.recompute:
        blocks = model.num_hidden_layers
        recomputed = max(0, blocks - plan.kept_as_fits(model, config, *place).keep_blocks)
        ranks.print(f"The backward pass recomputes {recomputed} of the decoder's {blocks} blocks.")


def _place(ranks: Ranks, dtype: torch.dtype) -> tuple[float, int, int, int]:
    """What the memory plan asks of a machine: bytes of a device, processes, those on one machine, bytes of a number."""
    if ranks.device.type == "cuda":
        capacity = torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.node_size
    return capacity, ranks.size, ranks.node_size, dtype.itemsize


def load_model(
    folder: Path, compute: torch.dtype, stored: torch.dtype, ranks: Ranks, across: str
) -> modeling.Qwen2_5_VL:
    """The model of a folder, its weights kept as `stored` and used as `compute`; sharded where there are ranks."""
    if ranks.size == 1:
        return load(folder, stored, ranks.device)
    with ranks.sync_errors():
        model = skeleton(folder)
    model = parallel.shard(model.to(stored), ranks, compute, across)
    return parallel.fill(model, stored_weights(folder, model), ranks)


def _fetched(config: AnyOptions, ranks: Ranks) -> AnyOptions:
    """`config` with files here in place of those it names on the hub: fetched by the main rank, then found by all."""

    def here(name: str) -> str:
        place = (fvqa.FVQA, fvqa.RESULTS) if name == "replay:fvqa" else fvqa.hub_file(name)
        return str(ranks.main_process_first(f"fetch {name}", partial(fvqa.fetched_file, *place))) if place else name

    found: dict[str, Any] = {"data": tuple(map(here, config.datasets))}
    if isinstance(config, Config):
        found = {"data": found["data"][0], "eval_data": here(config.eval_data)}
    if config.search == "replay:fvqa":
        found["search"] = f"replay:{here(config.search)}"
    return replace(config, **found)


def _questions(name: str, world: toy.World | None, config: Options, ranks: Ranks) -> Sequence[Example]:
    """The toy world's training questions, or those of a file, every picture of which some rank has opened."""
    if name == "toy":
        return world.train
    questions = read_examples(name, config.format, config.columns, config.images)
    if not len(questions):
        raise UserError(f"{name}: there is no question with a picture in it; give a file with at least one")
    if questions.left_out:
        some = f"{questions.left_out} of {len(questions.table)} questions"
        ranks.print(f"{name}: {some} have no picture and are left out.")
    for note in questions.notes:
        ranks.print(f"{name}: {note}.")
    if isinstance(config, EvalConfig) and config.limit:
        questions.keep(range(min(config.limit, len(questions))))
    places, hidden = range(ranks.rank, len(questions), ranks.size), None if ranks.main else True
    for place in tqdm(places, desc="checking pictures", unit="picture", leave=False, disable=hidden):
        try:
            decode(questions[place].image)
        except ValueError as error:
            raise UserError(f"{name}: row {questions.rows[place]}: {error}; mend or remove this row") from None
    return questions


def _search(
    config: Options, search: str, world: toy.World | None, known: Sequence[Sequence[Example]], ranks: Ranks
) -> tuple[Search, Scripts | None]:
    """The search engine, and the recorded turns to force. `known`: questions whose pictures a recording may name."""
    if search == "toy":
        if config.datasets != ("toy",):
            raise UserError("--search toy knows the toy world's pictures only: give another --search, or none")
        return Search(world.web), None
    scripts, file = None, search.removeprefix("replay:")
    if isinstance(config, Config) and config.force_searches:
        if not file.endswith(".jsonl"):
            raise UserError(f"--force-searches: {file} holds no conversations: give replay:FILE.jsonl with some")
        scripts = partial(_recorded_script, recorded_turns(file), config.group_size)
    if ranks.main and config.search == "replay:fvqa" and config.max_texts and config.on_miss != "error":
        advice = "give --search live or local:FILE, or --max-texts 0"
        print(
            f"--search replay:fvqa holds image searches only: every text search finds nothing; {advice}",
            file=sys.stderr,
        )
    options, ledger = replace(config, search=search), Path(config.out) / "spent.sqlite"
    return open_backend(options, chain(*known), ledger, quiet=not ranks.main), scripts


def _recorded_script(recorded: dict, group_size: int, example: Example, sample: int) -> list[str]:
    """The recorded searches of an example, for the first half of its group; the other half is free."""
    if sample >= group_size // 2:
        return []
    return [turn.response for turn in recorded.get(example.id, ()) if turn.observation is not None]


def _imitate_file(setup: Setup) -> None:
    """Keep the questions that --demonstrations shows rightly answered, and have the turns that did so played."""
    files, questions = setup.config.demonstrations, setup.questions
    found = demonstrations(files)

    def right(example: Example) -> list[list[str]]:
        return [said for said in found.get(example.id, ()) if _answers(setup, example, said)]

    known = [place for place, example in enumerate(questions) if example.id in found]
    shown = {place: len(right(questions[place])) for place in known}
    places = [place for place in known if shown[place]]
    if not places:
        complaint = "answers a question rightly" if known else "is about a question of --data: ids must be the same"
        raise UserError(f"--demonstrations {' '.join(files)}: none of {len(found)} {complaint}; give others")
    conversations = f"{sum(shown.values())} of {sum(map(len, found.values()))}"
    setup.ranks.print(f"Demonstrations: {conversations} are right, on {len(places)} of {len(questions)} questions.")
    if isinstance(questions, list):
        setup.questions = [questions[place] for place in places]
    else:
        questions.keep(places)  # type: ignore[attr-defined]  # what is no list is a Dataset

    def script(example: Example, sample: int) -> list[str]:
        turns = right(example)
        return turns[sample % len(turns)]

    setup.scripts = script


def _answers(setup: Setup, example: Example, said: Sequence[str]) -> bool:
    """Whether the last of these turns ends a conversation with the right answer."""
    if not said or setup.chat.parse(said[-1]).name != ANSWER:
        return False
    episode = Episode(example, 0, 0, turns=[Turn("assistant", said[-1], 0, 0)], status=ANSWERED)
    return answer_score(episode, setup.config.reward_rule) == 1


def _teacher(setup: Setup) -> Teacher:
    from mmsr.data.teacher import ANSWER_TOKENS, Teacher
    from mmsr.net.completions import open_server

    c = setup.config
    complete = partial(open_server(c.teacher, c.teacher_model).complete, max_tokens=ANSWER_TOKENS)
    kept = Path(c.out) / "teacher.jsonl"
    return Teacher(complete, c.teacher_model, kept, setup.chat, setup.toolbox, _limits(c))


def _limits(config: Options) -> Limits:
    return Limits(
        config.max_turns, config.min_pixels, config.max_pixels, tool_seconds=config.tool_timeout,
        stop_on_tool_error=config.on_tool_error == "drop",
    )  # fmt: skip


def _eval_questions(
    config: Config, world: toy.World | None, questions: Sequence[Example], ranks: Ranks
) -> list[Example]:
    if config.eval_data and config.eval_data != "toy":
        questions = _questions(config.eval_data, world, config, ranks)
    elif world and "toy" in (config.data, config.eval_data):
        return _toy_questions(world, config.eval_size)
    return [questions[i] for i in range(min(config.eval_size, len(questions)))]


def _evaluated(name: str, world: toy.World | None, config: EvalConfig, ranks: Ranks) -> Sequence[Example]:
    return _toy_questions(world, config.limit or 200) if name == "toy" else _questions(name, world, config, ranks)


def _toy_questions(world: toy.World, n: int) -> list[Example]:
    """`n` questions of each category about fresh pictures."""
    asked = [world.questions(category, n, "eval") for category in world.settings.categories]
    return [example for category in asked for example in category]
