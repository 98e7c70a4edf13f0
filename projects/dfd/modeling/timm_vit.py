"""timm's plain vision transformers as Detectron2 backbones, with ViTDet's windowed attention.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ECCV 2022): most
blocks attend within windows, a few globally. The blocks, their weights and their names are timm's.

Shape shorthand: N images, P prefix tokens (class token, registers), H x W patches, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.modeling import Backbone
from timm.layers import use_fused_attn
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..ranges import check_count
from .timm_weights import create_trunk, plain
from .windows import TokenOrder, attend_in_windows, choose_window

_NUM_GLOBAL = 4
Attend = Callable[[Tensor], Tensor]


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _run_block(block: Block, x: Tensor, attend: Attend) -> Tensor:
    x = x + block.drop_path1(block.ls1(attend(block.norm1(x))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _run_res_post(block: ResPostBlock, x: Tensor, attend: Attend) -> Tensor:
    x = x + block.drop_path1(block.norm1(attend(x)))
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _run_eva(block: EvaBlock, x: Tensor, attend: Attend) -> Tensor:
    x = x + block.drop_path1(_scaled(block.gamma_1, attend(block.norm1(x))))
    return x + block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(x))))


def _run_eva_post(block: EvaBlockPostNorm, x: Tensor, attend: Attend) -> Tensor:
    x = x + block.drop_path1(block.norm1(attend(x)))
    return x + block.drop_path2(block.norm2(block.mlp(x)))


# timm's own forward of each block, with another attention: its drop path must see whole images,
# not windows, so the block cannot simply be called on windows.
_RUN: dict[type, Callable[[Any, Tensor, Attend], Tensor]] = {
    Block: _run_block,
    ResPostBlock: _run_res_post,
    EvaBlock: _run_eva,
    EvaBlockPostNorm: _run_eva_post,
}


class TimmViT(Backbone):
    """A plain ViT of timm, by name; its one feature map is the patches after its last block.

    Images of any height and width that its patches divide will do. Position embeddings are
    resampled to the image's grid as timm does (bicubic, antialiased), rotary tables are made for
    the grid in global blocks and for the window in windowed ones.
    """

    def __init__(
        self,
        *,
        model_name: str,
        img_size: int | Sequence[int] = 1024,
        patch_size: int | None = None,
        pretrained: bool | str = False,
        window_size: int | str = "auto",
        global_blocks: int | Sequence[int] = _NUM_GLOBAL,
        prefix_tokens: str = "keep",
        drop_path_rate: float = 0.0,
        act_checkpoint: bool = False,
        final_norm: bool = False,
        out_feature: str = "last_feat",
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model_name: as in ``timm.list_models()``, e.g. "vit_small_patch16_224.augreg_in21k".
                Of the classes VisionTransformer (augreg, DeiT, DeiT-III, MAE, DINOv2, CLIP, SigLIP)
                and Eva (EVA-02, DINOv3).
            img_size: the usual side of the images in pixels, or (height, width). Position
                embeddings are kept at its grid, and "auto" windows are chosen for it.
            patch_size: in pixels; None: the model's own, but 16 for one of 14, because a
                pyramid's strides are powers of two. Weights are resampled when they are loaded.
            pretrained: True: timm's own weights, by download; a path: a local file, of timm, MAE
                or DINOv2, or safetensors; False: random.
            window_size: side of the windows in patches; "auto": see ``windows.choose_window``;
                0: every block is global.
            global_blocks: which blocks attend globally: their numbers, or how many, evenly placed
                and the last among them.
            prefix_tokens: "keep": class token and registers take part in every block, and every
                window sees them; "drop": patches alone, as in ViTDet.
            drop_path_rate: stochastic depth, rising linearly over the blocks.
            act_checkpoint: keep no activations within blocks: slower, less memory.
            final_norm: whether timm's last norm is applied; ViTDet has none.
            out_feature: the name of the output.
            model_args: more arguments of timm's model, e.g. ``{"depth": 3}``.

        Raises:
            UserError: an unknown or unsuitable model, weights that do not fit, or a setting
                outside its range.
        """
        super().__init__()
        where = f"TimmViT({model_name})"
        self.model_name, self.pretrained = model_name, pretrained
        arguments = plain(model_args)
        if patch_size is None and "_patch14" in model_name:
            patch_size = 16
        if patch_size is not None:
            arguments["patch_size"] = patch_size
        self.vit = create_trunk(
            model_name,
            pretrained=pretrained,
            final_norm=final_norm,
            kinds=(VisionTransformer, Eva),
            img_size=_pair(img_size),
            dynamic_img_size=True,
            drop_path_rate=drop_path_rate,
            **arguments,
        )
        if final_norm and isinstance(self.vit.norm, nn.Identity):
            raise UserError(
                f"{where}: final_norm is True, but it has no norm over its tokens (timm has one "
                "after they are averaged): set it to False"
            )
        self.vit.prune_intermediate_layers(1, prune_norm=not final_norm, prune_head=True)
        if prefix_tokens not in ("keep", "drop"):
            raise UserError(f"{where}: prefix_tokens is {prefix_tokens!r}; it must be keep or drop")
        if prefix_tokens == "drop":
            _drop_prefix(self.vit)
        depth = len(self.vit.blocks)
        self.global_blocks = _choose_blocks(global_blocks, depth, where)
        grid = self.vit.patch_embed.grid_size
        self.window_size = choose_window(*grid) if window_size == "auto" else window_size
        if not isinstance(self.window_size, int) or self.window_size < 0:
            raise UserError(
                f"{where}: window_size is {window_size!r}; it must be auto or a number >= 0"
            )
        if self.window_size == 0:
            self.global_blocks = frozenset(range(depth))
        self._check_blocks(where)
        self.act_checkpoint = act_checkpoint
        self.final_norm = final_norm
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: self.vit.embed_dim}
        self._out_feature_strides = {out_feature: self.vit.patch_embed.feat_ratio()}

    def _check_blocks(self, where: str) -> None:
        """Refuse what would be computed otherwise than timm does."""
        if not isinstance(getattr(self.vit, "patch_drop", None), nn.Identity | None):
            raise UserError(f"{where}: patch dropout leaves no grid: set patch_drop_rate to 0")
        for index, block in enumerate(self.vit.blocks):
            if index not in self.global_blocks and type(block) not in _RUN:
                raise UserError(
                    f"{where}: its blocks are {type(block).__name__}s, which are not known to "
                    "compute the same in windows: set window_size=0"
                )

    @property
    def num_prefix_tokens(self) -> int:
        return self.vit.num_prefix_tokens

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides[self._out_features[0]]

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.size_divisibility}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (N,3,height,width), normalised; both sides multiples of the patch size.

        Returns:
            ``{out_feature: (N,C,H,W)}``, in the memory format channels-last.
        """
        height, width = self._grid(images)
        self._choose_attention(images.device.type)
        order = TokenOrder(height=height, width=width, window=self.window_size)
        x, rope = self._embed(images)
        prefix = self.num_prefix_tokens
        if order.by_window:
            x = torch.cat([x[:, :prefix], order.enter(x[:, prefix:])], dim=1)
        tables = self._rotary_tables(rope, order)
        for index, block in enumerate(self.vit.blocks):
            run = partial(self._run, index, block, order=order, tables=tables)
            if self.act_checkpoint and self.training:
                x = checkpoint(run, x, use_reentrant=False)
            else:
                x = run(x)
        x = self.vit.norm(x)
        return {self._out_features[0]: order.leave(x[:, prefix:]).permute(0, 3, 1, 2)}

    def _choose_attention(self, device_type: str) -> None:
        """Fused attention (SDPA), but plain products in bf16 on a CPU.

        There SDPA's kernels take half as long again, forward and backward (AVX512-BF16).
        """
        slow = device_type == "cpu" and torch.is_autocast_enabled("cpu")
        for block in self.vit.blocks:
            for attention in _attentions(block):
                attention.fused_attn = use_fused_attn() and not slow

    def _grid(self, images: Tensor) -> tuple[int, int]:
        stride = self.size_divisibility
        height, width = images.shape[-2:]
        if height % stride or width % stride:
            raise UserError(
                f"TimmViT: a batch of {height} x {width} pixels is not a multiple of the patch "
                f"size {stride}: pad it (as SimplePyramid has Detectron2 do)"
            )
        return height // stride, width // stride

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (N, P + H*W, C) row by row, and the rotary table of the grid if there is one."""
        x, rope = self.vit.patch_embed(images), None
        if isinstance(self.vit, Eva):
            x, rope = self.vit._pos_embed(x)
        else:
            x = self.vit._pos_embed(x)
        return self.vit.norm_pre(x), rope

    def _rotary_tables(
        self, rope: Tensor | None, order: TokenOrder
    ) -> tuple[Tensor | None, Tensor | None]:
        """The tables of global and of windowed blocks, (H*W, D) and (s*s, D).

        Under mixed frequencies both have leading dimensions: (blocks, heads, ., D).
        """
        if rope is None or not order.window:
            return rope, None
        window = self.vit.rope.get_embed(shape=(order.window, order.window))
        return order.enter(rope), window

    def _run(
        self,
        index: int,
        block: nn.Module,
        x: Tensor,
        *,
        order: TokenOrder,
        tables: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        windowed = index not in self.global_blocks
        table = tables[windowed]
        if table is not None and getattr(self.vit, "rope_mixed", False):
            table = table[index]
        kwargs = {} if table is None else {"rope": table}
        if not windowed:
            return block(x, **kwargs)
        attend = partial(
            attend_in_windows, block.attn, order=order, num_prefix=self.num_prefix_tokens, **kwargs
        )
        return _RUN[type(block)](block, x, attend)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _choose_blocks(chosen: int | Sequence[int], depth: int, where: str) -> frozenset[int]:
    if isinstance(chosen, int):
        count = min(check_count(f"{where}: global_blocks", chosen, 0), depth)
        chosen = [(i + 1) * depth // count - 1 for i in range(count)]
    if any(not 0 <= index < depth for index in chosen):
        raise UserError(
            f"{where}: global_blocks names {list(chosen)}, but it has blocks 0 to {depth - 1}"
        )
    return frozenset(chosen)


@torch.no_grad()
def _drop_prefix(vit: nn.Module) -> None:
    """Leave a timm ViT its patches alone."""
    count = vit.num_prefix_tokens
    if vit.pos_embed is not None and not vit.no_embed_class:
        vit.pos_embed = nn.Parameter(vit.pos_embed[:, count:].clone())
    vit.cls_token = vit.reg_token = None
    vit.num_prefix_tokens = 0
    for block in vit.blocks:
        for attention in _attentions(block):
            # Rotary attention leaves out so many tokens.
            if hasattr(attention, "num_prefix_tokens"):
                attention.num_prefix_tokens = 0


def _attentions(block: nn.Module) -> list[nn.Module]:
    """What of a block has the switch of timm's fused attention: it may compute several."""
    attention = getattr(block, "attn", None)
    if attention is not None:
        return [attention]
    return [module for module in block.modules() if hasattr(module, "fused_attn")]
