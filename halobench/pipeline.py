"""A recipe's stages in order: transfer, align, select, distil, finetune, scale. A stage that is done is skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import from_dict, to_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import read_json, write_json
from halobench.models import CARD, card_of, load, resolve
from halobench.progress import say
from halobench.provenance import model_hash
from halobench.recipe import STAGES, Recipe
from halobench.records import LedgerRow, ModelCard, RunRecord
from halobench.run import RunFolder, StageNote

if TYPE_CHECKING:
    from halobench.mixers.contract import Mixer
    from halobench.surgery.loop import Loop, LoopConfig, Objective
    from halobench.surgery.plan import SurgeryPlan
    from halobench.surgery.planted import Mixture
    from halobench.surgery.selection import Ranking
    from halobench.surgery.selection.contract import Need
    from halobench.surgery.selection.evidence import Evidence


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
    ) -> None:
        from halobench.surgery.parallel import Team

        self.teacher_name, self.recipe, self.device, self.given = teacher, recipe, device, given
        self.credit = credit
        where = Path(resolve(teacher))
        self.teacher_hash = model_hash(where) if where.is_dir() else teacher
        identity = {"teacher": self.teacher_hash, "recipe": to_dict(recipe), "layers": list(given) if given else None}
        self._check()
        self.team = Team.join()
        if self.team.leads:
            RunFolder(folder, identity, teacher)
        self.team.wait()
        self.run = RunFolder(folder, identity, teacher)
        self.base = self._aligned_run(aligned, identity) if aligned is not None else self.run

    def _check(self) -> None:
        """Raises UserError for what can be known to be wrong before anything is written."""
        from halobench.surgery.corpus import source_files

        self.recipe.plan(self.teacher.config, list(self.given) if self.given else self.recipe.keep)
        source_files(self.recipe.data)

    def _aligned_run(self, path: Path, identity: dict[str, Any]) -> RunFolder:
        if not (path / "run.json").exists():
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
        torch.manual_seed(self.recipe.seed)  # of the new weights
        mixers = build_mixers(self.teacher, self.recipe.mixer, self.recipe.mixer_options)
        for mixer in mixers.values():
            mixer.to(self.device).float().train()
        objective = Alignment(self.teacher, mixers, self.recipe.align.relative)
        self._describe("align", self.recipe.align, objective)
        result = self._loop("align", objective, self.recipe.align, 0).run()
        folder = self.run.path / "align" / "mixers"
        if self.team.leads:
            save_mixers(folder, mixers)
        self.team.wait()
        errors = {str(layer): round(error, 5) for layer, error in objective.layer_errors.items()}
        note = self._note("align", self.teacher_hash, model_hash(folder), result, {"relative_error": errors})
        worst = max(errors, key=lambda k: errors[k])
        self._tell(
            f"align: error {note.first_loss:.4f} -> {note.last_loss:.4f}; hardest layer {worst}, {errors[worst]:.3f}"
        )
        return note

    def mixers(self) -> dict[int, Mixer]:
        """The aligned mixers."""
        from halobench.surgery.checkpoint import load_mixers

        self.align()
        found = load_mixers(self.base.path / "align" / "mixers", self.teacher)
        return {layer: mixer.to(self.device).eval() for layer, mixer in found.items()}

    # Selection --------------------------------------------------------------------------------------------------------

    def evidence(self, needs: set[Need]) -> Evidence:
        """The sweep of the aligned run, made where it is missing: "sweep" and "restored" are what selectors need."""
        from halobench.evidence import gather

        return gather(self, self.base.path / "select", needs)

    def rank(self, methods: list[str]) -> list[Ranking]:
        """The answers of several selectors, on one sweep."""
        from halobench.surgery.selection import SELECTORS, Question

        selectors = [SELECTORS.get(name)() for name in methods]
        needs: set[Need] = {s.needs for s in selectors} - {"nothing"}
        evidence = self.evidence(needs) if needs else None
        question = Question(
            layers=self.layers,
            keep=len(self.given) if self.given else self.recipe.kept_count(self.layers),
            seed=self.recipe.seed,
            evidence=evidence,
            given=self.given,
        )
        return [selector.rank(question) for selector in selectors]

    def select(self) -> list[int]:
        """The kept layers by the recipe's selector."""
        path = self.run.path / "select" / "choice.json"
        if path.exists():
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
        from halobench.surgery.stages.distil import Distillation

        done = self.run.note("distil")
        if done is not None:
            return done
        before = self.align()
        plan = self.plan()
        torch.manual_seed(self.recipe.seed)  # of the new weights
        student: Any = transplant(self.teacher, plan, self.mixers())
        student.to(self.device).float().train().requires_grad_(True)
        objective = Distillation(student, self.teacher)
        self._describe("distil", self.recipe.distil, objective)
        result = self._loop("distil", objective, self.recipe.distil, before.sequences).run()
        folder = self.run.path / "distil" / "model"
        if self.team.leads:
            save_model(folder, student, self.tokenizer)
        self.team.wait()
        note = self._note("distil", before.hash, model_hash(folder), result, {"kept": list(plan.kept)})
        self._tell(f"distil: KL {note.first_loss:.3f} -> {note.last_loss:.3f} nats a token")
        return note

    def finetune(self) -> StageNote:
        """The student, trained on longer text without the teacher."""
        from halobench.surgery.checkpoint import save_model
        from halobench.surgery.stages.language import LanguageModelling

        done = self.run.note("finetune")
        if done is not None:
            return done
        before = self.distil()
        student = self._student("distil", before).float().train().requires_grad_(True)
        objective = LanguageModelling(student, "finetune")
        self._describe("finetune", self.recipe.finetune, objective)
        result = self._loop("finetune", objective, self.recipe.finetune, before.sequences).run()
        folder = self.run.path / "finetune" / "model"
        if self.team.leads:
            save_model(folder, student, self.tokenizer)
        self.team.wait()
        note = self._note(
            "finetune", before.hash, model_hash(folder), result, {"length": max(self.recipe.finetune.lengths)}
        )
        self._tell(f"finetune: loss {note.first_loss:.3f} -> {note.last_loss:.3f}")
        return note

    def finish(self) -> ModelCard:
        """Finds the scale of the NoPE queries, and leaves the finished hybrid with its card in RUN/model."""
        from halobench.surgery.checkpoint import save_model
        from halobench.surgery.hybrid import backends_of
        from halobench.surgery.stages.scale import search_scale

        done = self.run.path / "model" / CARD
        if done.exists():
            return from_dict(ModelCard, read_json(done), str(done))
        before = self.finetune()
        student = self._student("finetune", before).eval()
        scale, losses, seconds, tokens = None, {}, 0.0, 0
        if self.recipe.scale is not None and self.recipe.hype and self.plan().kept:
            found = search_scale(student, self.data(self.recipe.finetune), self.recipe.scale, self.device)
            scale, losses, seconds, tokens = found.best, found.losses, found.seconds, found.tokens
            student.set_logits_scale(scale)
            self._tell(f"scale: queries without positions are scaled by log_a(t + a) with a = {scale:g}")
        self._note_of("scale", before.hash, before.hash, tokens, seconds, {"a": scale, "losses": losses})
        card = self._card(student)
        folder = self.run.path / "model"
        if self.team.leads:
            save_model(folder, student, self.tokenizer)
            write_json(folder / CARD, to_dict(card))
            self._record(card, losses, backends_of(student))
        self.team.wait()
        self._tell(f"done: {folder}")
        return card

    # Shared -----------------------------------------------------------------------------------------------------------

    def data(self, config: LoopConfig) -> Mixture:
        """The stream of text and planted retrieval that every stage draws from."""
        from halobench.surgery.corpus import open_text
        from halobench.surgery.planted import Mixture, Planted

        text = open_text(self.recipe.data, self.tokenizer, self.recipe.seed)
        planted = None
        if config.planted > 0:
            filler = open_text(self.recipe.data, self.tokenizer, self.recipe.seed + 1)
            planted = Planted(self.tokenizer, filler, self.recipe.seed)
        return Mixture(text, planted, config.planted, self.recipe.seed)

    def _loop(self, stage: str, objective: Objective, config: LoopConfig, first: int) -> Loop:
        from halobench.surgery.loop import Loop

        return Loop(
            self.run.path / stage,
            objective,
            self.data(config),
            config,
            first_sequence=first,
            device=self.device,
            team=self.team,
        )

    def _describe(self, stage: str, config: LoopConfig, objective: Objective) -> None:
        trains = sum(p.numel() for _, p in objective.parameters())
        lengths = "/".join(map(str, config.lengths))
        self._tell(f"{stage}: {config.tokens:,} tokens at length {lengths}, {trains:,} parameters train")

    def _tell(self, text: str) -> None:
        """One line of the story, from one of the processes that share the work."""
        if self.team.leads:
            say(text)

    def _student(self, stage: str, note: StageNote) -> Any:
        import torch

        from halobench.surgery.checkpoint import load_model

        folder = self.run.path / stage / "model"
        if model_hash(folder) != note.hash:
            raise HalobenchError(
                f"{folder} is not what stage {stage} wrote (its hash changed); remove the folder {stage}"
            )
        return load_model(str(folder), dtype=torch.float32, device=self.device)

    def _note(self, stage: str, came_from: str, hash: str, result: Any, details: dict[str, Any]) -> StageNote:
        losses = {"first_loss": result.first_loss, "last_loss": result.last_loss}
        return self._note_of(
            stage, came_from, hash, result.tokens, result.seconds, details, sequences=result.sequences,
            **{k: None if math.isnan(v) else v for k, v in losses.items()},
        )  # fmt: skip

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
                    rows.append(LedgerRow(what=f"select ({found['label']})", tokens=found["cost_tokens"], seconds=0.0))
                continue
            note = self.run.note(stage) or self.base.note(stage)
            if note is not None:
                rows.append(note.ledger())
        return rows

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
            trained_length=max(self.recipe.finetune.lengths),
            ledger=self.ledger(),
        )

    def _record(self, card: ModelCard, scale_losses: dict[str, float], forms: dict[str, str]) -> None:
        notes = [note for stage in STAGES if (note := self.run.note(stage) or self.base.note(stage)) is not None]
        RunRecord(
            kind="convert",
            model=card,
            settings={"recipe": to_dict(self.recipe)},
            lineage={note.stage: note.hash for note in notes},
            ledger=card.ledger,
            backends={"device": self.device, **forms},
            details={"stages": [to_dict(replace(n, details={})) for n in notes], "scale": scale_losses},
        ).save(self.run.path / "convert.record.json")
