"""What can be known to be wrong with a conversion before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halobench.errors import UserError

if TYPE_CHECKING:
    from halobench.pipeline import Conversion


def check_request(conversion: Conversion) -> None:
    """Raises UserError for a tokenizer, layers, selectors, lengths or text that cannot do."""
    from halobench.surgery.corpus import check_tokenizer
    from halobench.surgery.documents import source_files

    recipe, config = conversion.recipe, conversion.teacher.config
    check_tokenizer(conversion.tokenizer, config)
    recipe.plan(config, list(conversion.given) if conversion.given else recipe.keep)
    conversion.selectors([recipe.select, *recipe.selector_options])
    if recipe.select == "given" and not conversion.given:
        raise UserError("the selector `given` needs layers: write --layers 2,7")
    _check_lengths(conversion)
    source_files(recipe.data)


def _check_lengths(conversion: Conversion) -> None:
    """No stage may read beyond a teacher's table of positions."""
    from halobench.tasks.scoring import check_context

    recipe = conversion.recipe
    stages = {"align": recipe.align, "distil": recipe.distil, "finetune": recipe.finetune, "scale": recipe.scale}
    for stage, config in stages.items():
        longest = max(config.lengths) if config is not None else 0
        try:
            check_context(conversion.teacher, longest)
        except UserError as error:
            raise UserError(f"{stage}.lengths has {longest}; {error}") from error
