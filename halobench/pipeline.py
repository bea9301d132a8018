"""A recipe's stages in order: transfer, align, select, distil, finetune, scale. A stage that is done is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import from_dict, to_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import drop_halves, read_json, write_json
from halobench.models import CARD, card_of, load, resolve
from halobench.preflight import check_request
from halobench.progress import say
from halobench.provenance import model_hash
from halobench.recipe import STAGES, Recipe
from halobench.records import LedgerRow, ModelCard, RunRecord
from halobench.run import RunFolder, StageNote, arrow, held_out
from halobench.units import format_count

if TYPE_CHECKING:
    import torch

    from halobench.mixers.contract import Mixer
    from halobench.surgery.corpus import TextSource
    from halobench.surgery.loop import LoopConfig, StageResult
    from halobench.surgery.objective import Objective
    from halobench.surgery.plan import SurgeryPlan
    from halobench.surgery.planted import Mixture
    from halobench.surgery.selection import Question, Ranking, Selector
    from halobench.surgery.stages.align import Alignment


class Conversion:
    """One teacher becoming one hybrid in one directory.

    Args:
        teacher: what `models.resolve` takes.
        recipe: what to do.
        folder: the run's directory; a run begun with the same recipe and teacher is resumed.
        device: "cpu" or "cuda".
        given: layers for the selector `given`.
        aligned: another run whose alignment (and sweep) is used instead of making one.
        credit: when the layers are given because selectors chose them elsewhere, those selectors' answers.
        kernels: the form of the mixers' operators, one of `kernels.backend.BACKENDS`.
    """

    def __init__(
        self,
        teacher: str,
        recipe: Recipe,
        folder: Path,
        *,
        device: str,
        given: tuple[int, ...] | None = None,
        aligned: Path | None = None,
        credit: tuple[Ranking, ...] = (),
        kernels: str = "auto",
    ) -> None:
        from halobench.surgery.documents import corpus_hashes
        from halobench.surgery.parallel import Team

        self.teacher_name, self.recipe, self.device, self.given = teacher, recipe, device, given
        self.credit, self.kernels = credit, kernels
        self._shown: list[dict[str, Any]] = []  # the last table of what trains
        self._used: dict[str, str] = {}  # the forms that the mixers of the last stage really ran in
        where = Path(resolve(teacher))
        named = str(where.resolve()) if where.is_dir() and teacher != "tiny" else teacher  # found from anywhere
        self.teacher_hash = model_hash(where) if where.is_dir() else teacher
        self.team = Team.join(device)  # first, for it chooses this process's device
        check_request(self)
        identity = {
            "teacher": self.teacher_hash,
            "recipe": to_dict(recipe),
            "layers": list(given) if given else None,
            "data": corpus_hashes(recipe.data),
        }
        base = self._aligned_run(aligned, identity) if aligned is not None else None
        if base is not None and (note := base.note("align")) is not None:
            identity["aligned"] = note.hash
        if self.team.leads:
            RunFolder(folder, identity, named).sweep()
            drop_halves(folder)
        self.team.wait()
        if not (folder / "run.json").exists():
            raise UserError(
                f"{folder} is not seen by every process; several machines need one folder that all can reach"
            )
        self.run = RunFolder(folder, identity, named)
        self.base = base or self.run

    def _aligned_run(self, path: Path, identity: dict[str, Any]) -> RunFolder:
        if not (path / "run.json").exists() or not (path / "align" / "stage.json").exists():
            raise UserError(f"--aligned {path} is not a run; give the folder of a run that has finished `align`")
        there = read_json(path / "run.json")["identity"]
        for field in ("mixer", "mixer_options", "align"):
            if there["recipe"][field] != identity["recipe"][field]:
                raise UserError(f"--aligned {path} was aligned with another {field}; use the same recipe or align anew")
        if there["teacher"] != identity["teacher"]:
            raise UserError(f"--aligned {path} was aligned on another teacher; use the same teacher or align anew")
        return RunFolder(path, there, self.teacher_name)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load(self.teacher_name, device=self.device)
        return model.requires_grad_(False), tokenizer

    @property
    def teacher(self) -> Any:
        """The frozen teacher."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        return self._loaded[1]

    @cached_property
    def layers(self) -> int:
        """Layers of the teacher."""
        return int(self.teacher.config.num_hidden_layers)

    def convert(self, until: str = STAGES[-1]) -> Path:
        """Runs every stage up to `until`; returns the run's folder."""
        work: dict[str, Callable[[], Any]] = {
            "align": self.align,
            "select": self.select,
            "distil": self.distil,
            "finetune": self.finetune,
            "scale": self.finish,
        }
        self._tell(f"budget: {self.recipe.tokens(self.layers)}")
        if not (self.run.path / "model" / CARD).exists():
            self._open_text()
        for stage in STAGES[: STAGES.index(until) + 1]:
            work[stage]()
        return self.run.path

    # Stage 1 ----------------------------------------------------------------------------------------------------------

    def align(self) -> StageNote:
        """A mixer for every layer, trained on the teacher's hidden states."""
        import torch

        from halobench.surgery.checkpoint import save_mixers
        from halobench.surgery.stages.align import Alignment
        from halobench.surgery.transplant import build_mixers

        done = self.base.note("align")
        if done is not None:
            return done
        self._check_identity()
        torch.manual_seed(self.recipe.seed)  # of the new weights
        mixers = build_mixers(self.teacher, self.recipe.mixer, self.recipe.mixer_options)
        for mixer in mixers.values():
            mixer.to(self.device).float().train()
        objective = Alignment(self.teacher, mixers, self.recipe.align.relative)
        result = self._train("align", objective, self.recipe.align, None)
        folder = self.run.path / "align" / "mixers"
        if self.team.leads:
            save_mixers(folder, mixers)
        self.team.wait()
        self._measure_alignment(objective)
        errors = {str(layer): round(error, 5) for layer, error in objective.layer_errors.items()}
        worst = max(errors, key=lambda k: errors[k])
        self._tell(
            f"align: error {arrow(result.first_loss, result.last_loss)}{held_out(result)}; hardest layer {worst}, "
            f"{errors[worst]:.3f}"
        )
        return self._note("align", self.teacher_hash, model_hash(folder), result, {"relative_error": errors})

    def _measure_alignment(self, objective: Alignment) -> None:
        """Leaves each layer's error on one held-out sequence in the objective, also where training was over before."""
        import torch

        config = self.recipe.align
        sequence = self.data(config).held_out(0, max(config.lengths) + 1)
        tokens = torch.from_numpy(sequence.tokens)[None].to(self.device)
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            objective.loss(tokens, torch.ones_like(tokens))

    def _open_text(self) -> None:
        """Before anything trains: one process tokenises the text, for all, and it must be enough for the recipe."""
        from halobench.surgery.corpus import check_budget

        if not self.team.leads:
            self.team.wait()
        text = self._text
        if self.team.leads:
            self.team.wait()
        check_budget(text, self.recipe.tokens(self.layers).training, self.recipe.epochs, "the recipe")

    def _check_identity(self) -> None:
        """Before the alignment: a student with nothing replaced is the teacher."""
        import torch

        from halobench.surgery.gates import check_identity

        self._open_text()
        sequence = self.data(self.recipe.align).held_out(0, min(64, min(self.recipe.align.lengths)))
        check_identity(self.teacher, torch.from_numpy(sequence.tokens)[None].to(self.device))

    def mixers(self, dtype: torch.dtype | None = None) -> dict[int, Mixer]:
        """The aligned mixers, by default in the teacher's dtype."""
        from halobench.mixers.forms import ask_for
        from halobench.surgery.checkpoint import load_mixers

        folder = self.base.path / "align" / "mixers"
        if model_hash(folder) != self.align().hash:
            raise HalobenchError(f"{folder} is not what stage align wrote (its hash changed); remove the folder align")
        found = load_mixers(folder, self.teacher, dtype)
        for mixer in found.values():
            ask_for(mixer.to(self.device).eval(), self.kernels)
        return found

    # Selection --------------------------------------------------------------------------------------------------------

    def selectors(self, methods: Collection[str]) -> list[Selector]:
        """The selectors of these names, with the recipe's options."""
        from halobench.surgery.selection import make_selector

        return [make_selector(name, self.recipe.selector_options.get(name)) for name in methods]

    def rank(self, methods: Collection[str]) -> list[Ranking]:
        """The answers of several selectors, on one sweep; what they read and is not there yet is measured."""
        from halobench.evidence import prices, question

        selectors = self.selectors(methods)
        needs = {need for selector in selectors for need in selector.needs}
        cost = prices(self) if needs else None
        for selector in selectors:
            if cost is not None and selector.needs:
                self._tell(f"select: {selector.label} costs about {format_count(selector.price(cost))} tokens")
        keep = len(self.given) if self.given else self.recipe.kept_count(self.layers)
        asked = question(self, needs, keep, self.given)
        return [self.timed(selector, asked) for selector in selectors]

    def timed(self, selector: Selector, asked: Question) -> Ranking:
        """A selector's answer, with the time it took: its own, and its share of the evidence's."""
        started = time.monotonic()
        answer = selector.rank(asked)
        if len(set(answer.layers)) != asked.keep:
            raise HalobenchError(f"{selector.name} kept {answer.layers}; {asked.keep} different layers were asked for")
        shared = asked.evidence.spent(selector.needs, answer.cost_tokens) if asked.evidence else 0.0
        return replace(answer, seconds=round(time.monotonic() - started + shared, 2))

    def select(self) -> list[int]:
        """The kept layers by the recipe's selector."""
        from halobench.surgery.parallel import agree

        path = self.run.path / "select" / "choice.json"
        if agree(self.team, path.exists())[0]:  # as the leader sees it, for the leader may be about to write
            return read_json(path)["layers"]
        ranking = self.credit[0] if self.credit else self.rank([self.recipe.select])[0]
        labels = [r.label for r in self.credit] or [ranking.label]
        if self.team.leads:
            write_json(path, {"method": ranking.method, "selectors": labels, **ranking.to_json()})
        self.team.wait()
        self._tell(f"select: {' = '.join(labels)} keeps layers {ranking.layers} as softmax")
        return ranking.layers

    def plan(self) -> SurgeryPlan:
        """Which layer becomes what."""
        return self.recipe.plan(self.teacher.config, self.select())

    # Stages 2 and 3 ---------------------------------------------------------------------------------------------------

    def distil(self) -> StageNote:
        """The student, distilled from the teacher."""
        import torch

        from halobench.surgery import transplant
        from halobench.surgery.checkpoint import save_model

        done = self.run.note("distil")
        if done is not None:
            return done
        before = self.align()
        plan = self.plan()
        torch.manual_seed(self.recipe.seed)  # of the new weights
        student: Any = transplant(self.teacher, plan, self.mixers(torch.float32))
        student.to(self.device).float().train().requires_grad_(True)
        config = self.recipe.distil
        objective = config.objective(student, self.teacher, kernels=self.kernels)
        result = self._train("distil", objective, config, before)
        folder = self.run.path / "distil" / "model"
        if self.team.leads:
            save_model(folder, student, self.tokenizer)
        self.team.wait()
        kind = "KL" if config.ce_share == 0 else "loss"
        losses = arrow(result.first_loss, result.last_loss)
        self._tell(f"distil: {kind} {losses} nats a token{held_out(result)}")
        return self._note("distil", before.hash, model_hash(folder), result, {"kept": list(plan.kept)})

    def finetune(self) -> StageNote:
        """The student, trained on longer text without the teacher; a budget of 0 leaves it as distillation made it."""
        from halobench.surgery.checkpoint import save_model
        from halobench.surgery.stages.language import LanguageModelling

        done = self.run.note("finetune")
        if done is not None:
            return done
        before = self.distil()
        self.teacher.cpu()  # its memory is for longer text now
        if self.recipe.finetune.tokens == 0:
            places = {"sequences": before.sequences, "position": before.position}
            return self._note_of("finetune", before.hash, before.hash, 0, 0.0, {}, **places)
        student = self._student("distil", before).float().train().requires_grad_(True)
        result = self._train("finetune", LanguageModelling(student, "finetune"), self.recipe.finetune, before)
        folder = self.run.path / "finetune" / "model"
        if self.team.leads:
            save_model(folder, student, self.tokenizer)
        self.team.wait()
        self._tell(f"finetune: loss {arrow(result.first_loss, result.last_loss)}{held_out(result)}")
        details = {"length": max(self.recipe.finetune.lengths)}
        return self._note("finetune", before.hash, model_hash(folder), result, details)

    def finish(self) -> ModelCard:
        """Finds the scale of the NoPE queries, and leaves the finished hybrid with its card in RUN/model."""
        from halobench.mixers.forms import used
        from halobench.surgery.checkpoint import save_model
        from halobench.surgery.stages.scale import scale_name, search_scale

        done = self.run.path / "model" / CARD
        if done.exists():
            return from_dict(ModelCard, read_json(done), str(done))
        before = self.finetune()
        student = self._student("finetune" if before.tokens else "distil", before).eval()
        scale, losses, seconds, tokens = None, {}, 0.0, 0
        if self.recipe.scale is not None and self.recipe.hype and self.plan().kept:
            data, quiet = self.data(self.recipe.finetune), not self.team.leads
            found = search_scale(student, data, self.recipe.scale, self.device, quiet=quiet)
            scale, losses, seconds, tokens = found.best, found.losses, found.seconds, found.tokens
            student.set_logits_scale(scale)
            self._tell(f"scale: queries without positions are scaled by log_a(t + a) with a = {scale_name(scale)}")
        self._note_of("scale", before.hash, before.hash, tokens, seconds, {"a": scale, "losses": losses})
        card = self._card(student)
        folder = self.run.path / "model"
        if self.team.leads:
            save_model(folder, student, self.tokenizer)
            card = replace(card, files=model_hash(folder))
            self._record(card, losses, used(student))
            write_json(folder / CARD, to_dict(card))
        self.team.wait()
        self._tell(f"done: {folder}")
        return card

    # Shared -----------------------------------------------------------------------------------------------------------

    @cached_property
    def _text(self) -> TextSource:
        """The recipe's text, opened once; every stage goes on in it where the one before ended."""
        from halobench.surgery.corpus import open_text

        return open_text(self.recipe.data, self.tokenizer, self.recipe.seed)

    def data(self, config: LoopConfig) -> Mixture:
        """The stream of text and planted retrieval that every stage draws from."""
        from halobench.surgery.planted import Mixture, Planted

        planted = Planted(self.tokenizer, self._text, self.recipe.seed) if config.planted > 0 else None
        return Mixture(self._text, planted, config.planted, self.recipe.seed)

    def _train(self, stage: str, objective: Objective, config: LoopConfig, before: StageNote | None) -> StageResult:
        """Says what a stage trains, and trains it; it goes on in the data where the stage before ended."""
        from halobench.mixers.forms import ask_for, used
        from halobench.surgery import gates
        from halobench.surgery.loop import Loop

        ask_for(objective.module, self.kernels)
        rows = gates.inventory(gates.trained(objective.module))
        lengths = "/".join(map(str, config.lengths))
        count = sum(row["parameters"] for row in rows)
        known = rows == self._shown
        self._tell(
            f"{stage}: {config.tokens:,} tokens at length {lengths}, {count:,} parameters train"
            + (", the same as before" if known else f":\n{gates.table(rows)}")
        )
        self._shown = rows
        loop = Loop(
            self.run.path / stage,
            objective,
            self.data(config),
            config,
            first_sequence=before.sequences if before else 0,
            first_position=before.position if before else 0,
            device=self.device,
            team=self.team,
        )
        result = loop.run()
        self._used = used(objective.module)
        return result

    def _tell(self, text: str) -> None:
        """One line of the story, from one of the processes that share the work."""
        if self.team.leads:
            say(text)

    def _student(self, stage: str, note: StageNote) -> Any:
        import torch

        from halobench.mixers.forms import ask_for
        from halobench.surgery.checkpoint import load_model

        folder = self.run.path / stage / "model"
        if model_hash(folder) != note.hash:
            raise HalobenchError(
                f"{folder} is not what stage {stage} wrote (its hash changed); remove the folder {stage}"
            )
        student = load_model(str(folder), dtype=torch.float32, device=self.device)
        ask_for(student, self.kernels)
        return student

    def _note(self, stage: str, came_from: str, hash: str, result: StageResult, details: dict[str, Any]) -> StageNote:
        numbers = ("sequences", "position", "first_loss", "last_loss", "fell", "held_out_before", "held_out_after")
        more = {name: getattr(result, name) for name in numbers}
        details = details | {"backends": self._used}
        return self._note_of(stage, came_from, hash, result.tokens, result.seconds, details, **more)

    def _note_of(
        self, stage: str, came_from: str, hash: str, tokens: int, seconds: float, details: dict[str, Any], **more: Any
    ) -> StageNote:
        note = StageNote(
            stage=stage, came_from=came_from, hash=hash, tokens=tokens, seconds=seconds, details=details,
            **{"sequences": 0, **more},
        )  # fmt: skip
        if self.team.leads:
            self.run.finish(note)
        self.team.wait()
        return note

    def ledger(self) -> list[LedgerRow]:
        """Tokens and seconds of everything this conversion rests on."""
        rows = []
        for stage in STAGES:
            if stage == "select":
                choice = self.run.path / "select" / "choice.json"
                if choice.exists():
                    found = read_json(choice)
                    name, spent = f"select ({found['label']})", (found["cost_tokens"], found["seconds"])
                    rows.append(LedgerRow(what=name, tokens=spent[0], seconds=spent[1]))
                continue
            note = self.run.note(stage) or self.base.note(stage)
            if note is not None:
                rows.append(note.ledger())
        return rows

    def _home(self, stage: str) -> RunFolder:
        """The run that a stage was made in: this one, or the one whose alignment it shares."""
        return self.run if self.run.note(stage) is not None else self.base

    def _card(self, student: Any) -> ModelCard:
        plan = self.plan()
        choice = read_json(self.run.path / "select" / "choice.json")
        positions = "hype" if self.recipe.hype else "rope"
        last = self.run.note("finetune")
        return ModelCard(
            name=f"{' = '.join(choice['selectors'])} {{{', '.join(map(str, plan.kept))}}}"
            + ("" if self.recipe.hype else ", RoPE kept"),
            path=self.run.path.name,
            hash=last.hash if last else "",
            layers=self.layers,
            parameters=sum(p.numel() for p in student.parameters()),
            teacher=card_of(self.teacher_name, self.teacher).name,
            mixer=self.recipe.mixer,
            selectors=choice["selectors"],
            kept=list(plan.kept),
            positions=positions,
            trained_length=max((self.recipe.finetune if self.recipe.finetune.tokens else self.recipe.distil).lengths),
            ledger=self.ledger(),
        )

    def _record(self, card: ModelCard, scale_losses: dict[str, float], forms: dict[str, str]) -> None:
        from halobench.finished import merged
        from halobench.surgery.documents import corpus_hashes

        notes = [note for stage in STAGES if (note := self.run.note(stage) or self.base.note(stage)) is not None]
        RunRecord(
            kind="convert",
            model=card,
            settings={"recipe": to_dict(self.recipe), "data": corpus_hashes(self.recipe.data)},
            lineage={note.stage: note.hash for note in notes},
            ledger=card.ledger,
            backends={"device": self.device, **merged([*(note.details.get("backends", {}) for note in notes), forms])},
            details={
                "stages": [to_dict(replace(n, details={})) for n in notes],
                "scale": scale_losses,
                "curves": {n.stage: found for n in notes if (found := self._home(n.stage).curve(n.stage))},
            },
        ).save(self.run.path / "convert.record.json")
