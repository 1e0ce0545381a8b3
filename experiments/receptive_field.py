"""What a unit sees: plain, dilated, hybrid-dilated and deformable stacks of convolutions.

Claim     A constant dilation sees far through a grid of holes, a hybrid schedule as far
          without any (Wang et al. 2018, arXiv:1702.08502, section 3.2, figure 2). And
          whatever a unit may see, its effective field is smaller and grows with the
          square root of depth (Luo et al. 2016, arXiv:1701.04128, section 2.1). A
          deformable stack, once its taps move, sees more than its rigid field (Dai et
          al. 2017, arXiv:1703.06211, figure 5).
Measured  For random stacks of 3 x 3 convolutions: the field by arithmetic from the
          layers, and that by gradients of the middle unit, averaged over images and
          initialisations; the share of the square that has any influence; the radius
          of the effective field for plain stacks of growing depth.
Run       python experiments/receptive_field.py            (about a minute on 2 CPU cores)
          python experiments/receptive_field.py --help
"""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.patches import Rectangle

from jaxmodels import plots
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.deformable import DeformableConv
from jaxmodels.ops.dilation import hybrid_dilations
from jaxmodels.receptive_field import Field, effective_field, field_bounds, receptive_field
from jaxmodels.training.experiment import Result, run

# The radius of the effective field of a plain stack grows with this power of its depth.
EXPONENT, TOLERANCE = 0.5, 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Every default of the experiment; each field is a flag."""

    depth: int = 6
    """Layers of the four stacks that are compared."""
    rate: int = 2
    """Dilation of the dilated stack, and the mean one of the hybrid."""
    depths: tuple[int, ...] = (4, 8, 16, 32)
    """Of the plain stacks whose effective field is measured."""
    features: int = 16
    """Channels of every layer."""
    images: int = 8
    """Random images that gradients are averaged over, each with its own weights."""
    shift: float = 1.5
    """Standard deviation of the deformable stack's offsets, in pixels."""
    seed: int = 0
    folder: Path | None = None
    """Where results go; by default runs/receptive_field/TIME."""


class Stack(nn.Module):
    """Convolutions of 3 x 3 with a ReLU after each but the last."""

    features: int
    dilations: tuple[int, ...]
    shift: float = 0.0

    @nn.compact
    def __call__(self, x):
        for i, dilation in enumerate(self.dilations):
            kind = DeformableConv if self.shift else Conv
            x = kind(self.features, 3, dilation=dilation)(nn.relu(x) if i else x)
        return x


def main(config: Config, folder: Path) -> Result:
    check(config)
    hybrid = hybrid_dilations(config.depth, config.rate)
    stacks = {
        "plain": Stack(config.features, (1,) * config.depth),
        f"dilated by {config.rate}": Stack(config.features, (config.rate,) * config.depth),
        f"hybrid {', '.join(map(str, hybrid))}": Stack(config.features, hybrid),
        "deformable": Stack(config.features, (1,) * config.depth, config.shift),
    }
    fields = {name: both_fields(config, stack) for name, stack in stacks.items()}
    plain = [both_fields(config, Stack(config.features, (1,) * n)) for n in config.depths]
    radii = [radius(effective) for _, effective in plain]
    draw_figure(config, folder, fields, plain, radii)
    return conclude(config, fields, plain, radii)


def check(config: Config) -> None:
    """Refuses what could not be measured."""
    if len(set(config.depths)) < 2 or min(config.depths) < 1:
        raise ValueError(f"depths={config.depths}: give two different numbers, at least 1")
    for name in ("depth", "rate", "features", "images"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.shift <= 0:
        raise ValueError(f"shift={config.shift} must be above 0; the plain stack is that of 0")


def both_fields(config: Config, stack: Stack) -> tuple[Field, np.ndarray]:
    """The field by arithmetic, and that of the middle unit by gradients."""
    margin = 0 if not stack.shift else round(4 * stack.shift * len(stack.dilations))
    side = 2 * sum(stack.dilations) + 1 + 2 * margin
    shape = (1, side, side, 3)
    middle = side // 2

    @jax.jit
    def one(key):
        for_weights, for_offsets, for_image = jax.random.split(key, 3)
        variables = stack.init(for_weights, jnp.zeros(shape))
        if stack.shift:
            variables = moved(variables, for_offsets, stack.shift)
        return effective_field(
            lambda x: stack.apply(variables, x)[:, middle, middle].sum(-1), for_image, shape
        )

    keys = jax.random.split(jax.random.key(config.seed), config.images)
    effective = np.mean([np.float64(one(key)) for key in keys], axis=0)
    return receptive_field(stack, shape).outputs, effective


def moved(variables, key, shift: float):
    """Offsets no longer zero: of random size and direction, the same at every place."""

    def draw(path, leaf):
        if jax.tree_util.keystr(path[-2:]) != "['offsets']['bias']":
            return leaf
        name = jax.tree_util.keystr(path)
        of_layer = jax.random.fold_in(key, sum(map(ord, name)))
        offsets = leaf.shape[0] * 2 // 3  # the rest are logits of masks
        return leaf.at[:offsets].set(shift * jax.random.normal(of_layer, (offsets,)))

    return jax.tree_util.tree_map_with_path(draw, variables)


def radius(effective: np.ndarray) -> float:
    """Root mean square distance from the middle, in pixels, of the squared gradients."""
    side = len(effective)
    distance = (np.arange(side) - side // 2) ** 2
    weight = effective**2 / np.sum(effective**2)
    return float(np.sqrt(np.sum(weight * (distance[:, None] + distance[None, :]))))


def covered(field: Field, effective: np.ndarray) -> float:
    """Share of the field by arithmetic where any gradient is not zero."""
    margin = (len(effective) - field.size[0]) // 2
    inside = effective[margin : margin + field.size[0], margin : margin + field.size[1]]
    return float(np.mean(inside > 0))


def agrees(field: Field, effective: np.ndarray) -> bool:
    """Whether both fields of the middle unit begin and end at the same pixels."""
    middle = len(effective) // 2
    return field.bounds((middle, middle)) == field_bounds(jnp.asarray(effective))


def conclude(config: Config, fields, plain, radii: list[float]) -> Result:
    """The claim held against the numbers."""
    _, (dilated, hybrid, deformable) = "plain", list(fields)[1:]
    exponent = float(np.polyfit(np.log(config.depths), np.log(radii), 1)[0])
    rigid = [*(pair for name, pair in fields.items() if name != deformable), *plain]
    measured = {"effective_radius_exponent": exponent}
    for name, (field, effective) in fields.items():
        measured[f"{name}: side by arithmetic"] = field.size[0]
        measured[f"{name}: share seen"] = covered(field, effective)
        measured[f"{name}: effective radius"] = radius(effective)
    rows, _ = field_bounds(jnp.asarray(fields[deformable][1]))
    measured["deformable: side by gradients"] = rows[1] - rows[0] + 1
    holds = (
        all(agrees(*pair) for pair in rigid)
        and covered(*fields[hybrid]) == 1.0
        and (config.rate == 1 or covered(*fields[dilated]) < 0.5)
        and fields[hybrid][0] == fields[dilated][0]
        and measured["deformable: side by gradients"] > fields[deformable][0].size[0]
        and abs(exponent - EXPONENT) <= TOLERANCE
    )
    return Result(
        claim=(
            "arithmetic and gradients agree for rigid stacks; a constant dilation sees less than "
            "half of its square and a hybrid one as wide all of it; a deformable stack sees beyond "
            f"its rigid field; the effective radius grows as depth^{EXPONENT} within {TOLERANCE}"
        ),
        source="Wang et al. 2018, arXiv:1702.08502, section 3.2; Luo et al. 2016, arXiv:1701.04128",
        holds=bool(holds),
        measured=measured,
    )


def draw_figure(config: Config, folder: Path, fields, plain, radii: list[float]) -> None:
    """Each stack's effective field in the square it may see, and growth with depth."""
    figure = plots.new_figure(width=4 * len(fields) + 5, height=4.5)
    *panels, last = figure.subplots(1, len(fields) + 1)
    extent = max(len(effective) for _, effective in fields.values()) / 2
    for axes, (name, (field, effective)) in zip(panels, fields.items(), strict=True):
        half = len(effective) / 2
        shown = np.log10(np.maximum(effective / effective.max(), 1e-6))
        shown = np.where(effective > 0, shown, np.nan)
        image = axes.imshow(shown, extent=(-half, half, half, -half), vmin=-6, vmax=0)
        low, side = -field.size[0] / 2, field.size[0]
        axes.add_patch(Rectangle((low, low), side, side, fill=False, color=plots.PALETTE[1], lw=2))
        axes.set(title=name, xlim=(-extent, extent), ylim=(extent, -extent), xlabel="pixels")
    figure.colorbar(image, ax=panels, label="influence, log10", shrink=0.7)
    analytic = [field.size[0] / 2 for field, _ in plain]
    plots.curve(
        last,
        {
            "half the side by arithmetic": (config.depths, analytic),
            "effective radius": (config.depths, radii),
            "proportional to depth^0.5": (
                config.depths,
                radii[0] * np.sqrt(np.array(config.depths) / config.depths[0]),
            ),
        },
        xlabel="layers of a plain stack",
        ylabel="pixels",
        title="growth with depth",
        logx=True,
        logy=True,
    )
    plots.save_figure(figure, folder / "figure.png")


if __name__ == "__main__":
    run(main, Config)
