"""The original DETR, Conditional DETR and Deformable DETR, small, with their parameters' names.

Written from the papers (arXiv:2005.12872, 2108.06152, 2010.04159; BatchFormerV2: 2204.01254), in
evaluation mode and without dropout. Images are (B, 3, H, W) with a mask (B, H, W), True where there
is padding; outputs are logits (B, Q, K) and boxes (B, Q, 4) as cx, cy, w, h of an image's own size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

HEADS = 8


class MLP(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Body(nn.Module):
    """ResNet-18, or a ResNet-50 of DC5, with frozen norms; gives the outputs of its last stages."""

    def __init__(self, num_stages: int, dilation: bool = False) -> None:
        super().__init__()
        norm = torchvision.ops.FrozenBatchNorm2d
        if dilation:
            stages = [False, False, True]
            self.body = torchvision.models.resnet50(
                norm_layer=norm, replace_stride_with_dilation=stages
            )
        else:
            self.body = torchvision.models.resnet18(norm_layer=norm)
        del self.body.fc
        self.num_stages = num_stages
        for name, value in self.named_buffers():  # the norms'
            at_least = -0.5 if name.endswith(("bias", "mean")) else 0.5
            value.uniform_(at_least, at_least + 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        net = self.body
        x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, stride=2, padding=1)
        maps = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            maps.append(x)
        return maps[-self.num_stages :]


@torch.no_grad()
def randomize(net: nn.Module) -> None:
    """Give every parameter a value that matters; copies and zeros would hide a wrong name."""
    for name, parameter in net.named_parameters():
        if "query_embed" in name or "level_embed" in name:
            parameter.normal_()
        elif parameter.dim() > 1:
            if not name.startswith("backbone."):  # whose maps would vanish or explode
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        else:
            at_least = -0.5 if name.endswith("bias") else 0.5
            parameter.uniform_(at_least, at_least + 1)


def sine(values: Tensor, channels: int) -> Tensor:
    """(…) of angles → (…, channels), sine and cosine in turn."""
    exponents = torch.arange(0, channels, 2) / channels
    angles = values[..., None] / 10000**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def position_of(mask: Tensor, channels: int, offset: float) -> Tensor:
    """(B, H, W) → (B, H·W, channels), of which the first half is y's."""
    embeddings = []
    for axis in (1, 2):
        place = (~mask).float().cumsum(axis)
        last = place.narrow(axis, place.shape[axis] - 1, 1)
        place = (place + offset) / (last + 1e-6) * 2 * math.pi
        embeddings.append(sine(place, channels // 2))
    return torch.cat(embeddings, dim=-1).flatten(1, 2)


def resized(mask: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(mask[None].float(), size=like.shape[-2:])[0].bool()


def inverse_sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def batchformers(width: int, layers: Sequence[int], share: bool, depth: int) -> nn.Module:
    """BatchFormerV2's modules as the authors register them."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 4, width, dropout=0.5)
        if depth == 1:
            return layer
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    if share:
        return make()
    return nn.ModuleList(make() if i in layers else nn.Identity() for i in range(2))


class Encoder(nn.Module):
    """Its BatchFormers work in evaluation too, on one stream."""

    def __init__(self, layer: nn.Module, bf: nn.Module | None, insert_idx: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        # A shared one is registered by the transformer alone.
        self.bf = bf if isinstance(bf, nn.ModuleList) else [bf] * 2
        self.insert_idx = insert_idx

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, *args)
            if i in self.insert_idx:
                x = self.bf[i](x)  # (B, L, C), of which B is taken for the sequence
        return x


class EncoderLayer(nn.TransformerEncoderLayer):
    def __init__(self, width: int) -> None:
        super().__init__(width, HEADS, 2 * width, batch_first=True)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        q = x + position
        x = self.norm1(x + self.self_attn(q, q, x, key_padding_mask=mask)[0])
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DecoderLayer(nn.TransformerDecoderLayer):
    def __init__(self, width: int) -> None:
        super().__init__(width, HEADS, 2 * width, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, query: Tensor, *at: Tensor) -> Tensor:
        position, mask = at
        q = x + query
        x = self.norm1(x + self.self_attn(q, q, x)[0])
        attended = self.multihead_attn(x + query, memory + position, memory, key_padding_mask=mask)
        x = self.norm2(x + attended[0])
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Decoder(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        if norm is not None:
            self.norm = norm


class Transformer(nn.Module):
    def __init__(
        self,
        encoder_layer: nn.Module,
        decoder: nn.Module,
        width: int,
        insert_idx: Sequence[int],
        share: bool,
        depth: int,
    ) -> None:
        super().__init__()
        if insert_idx:
            self.bf = batchformers(width, insert_idx, share, depth)
        self.encoder = Encoder(encoder_layer, getattr(self, "bf", None), insert_idx)
        self.decoder = decoder


class DETR(nn.Module):
    layer: type[nn.Module] = DecoderLayer

    def __init__(
        self,
        num_outputs: int = 92,
        width: int = 32,
        insert_idx: Sequence[int] = (),
        share: bool = False,
        depth: int = 1,
        dilation: bool = False,
    ) -> None:
        super().__init__()
        decoder = self.make_decoder(width)
        self.transformer = Transformer(
            EncoderLayer(width), decoder, width, insert_idx, share, depth
        )
        self.class_embed = nn.Linear(width, num_outputs)
        self.bbox_embed = MLP(width, width, width, 4)
        self.query_embed = nn.Embedding(5, width)
        self.input_proj = nn.Conv2d(2048 if dilation else 512, width, 1)
        self.backbone = nn.Sequential(Body(1, dilation))  # and positions, which have no parameters
        randomize(self)

    def make_decoder(self, width: int) -> nn.Module:
        return Decoder(DecoderLayer(width), nn.LayerNorm(width))

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input_proj(self.backbone[0](images)[-1])
        mask = resized(mask, x)
        position = position_of(mask, x.shape[1], offset=0)
        mask = mask.flatten(1)
        memory = self.transformer.encoder(tokens(x), position, mask)
        query = self.query_embed.weight.expand(len(x), -1, -1)
        hidden, reference = self.decode(memory, query, position, mask)
        return self.class_embed(hidden), (self.bbox_embed(hidden) + reference).sigmoid()

    def decode(self, memory: Tensor, query: Tensor, *at: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(query)
        for layer in self.transformer.decoder.layers:
            x = layer(x, memory, query, *at)
        return self.transformer.decoder.norm(x), torch.zeros(4)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    is_key = None if mask is None else ~mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_key)
    return out.transpose(1, 2).flatten(2)


class ConditionalDecoderLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for part in ("qcontent", "qpos", "kcontent", "kpos", "v"):
            self.add_module(f"sa_{part}_proj", nn.Linear(width, width))
            self.add_module(f"ca_{part}_proj", nn.Linear(width, width))
        self.ca_qpos_sine_proj = nn.Linear(width, width)
        self.self_attn = nn.ModuleDict({"out_proj": nn.Linear(width, width)})
        self.cross_attn = nn.ModuleDict({"out_proj": nn.Linear(width, width)})
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, x: Tensor, memory: Tensor, query: Tensor, at: Tensor, *rest: Tensor
    ) -> Tensor:
        position, mask = rest
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query)
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query)
        attended = attention(q, k, self.sa_v_proj(x))
        x = self.norm1(x + self.self_attn["out_proj"](attended))
        q, k = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)
        k_position = self.ca_kpos_proj(position)
        if self.ca_qpos_proj is not None:
            q, k = q + self.ca_qpos_proj(query), k + k_position
        q, k = beside(q, self.ca_qpos_sine_proj(at)), beside(k, k_position)
        attended = attention(q, k, self.ca_v_proj(memory), mask)
        x = self.norm2(x + self.cross_attn["out_proj"](attended))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


def beside(content: Tensor, position: Tensor) -> Tensor:
    """In each head the content and then the position."""
    return torch.cat([t.unflatten(2, (HEADS, -1)) for t in (content, position)], dim=3).flatten(2)


class ConditionalDETR(DETR):
    def __init__(self, num_outputs: int = 91, width: int = 256, **kwargs: object) -> None:
        super().__init__(num_outputs, width, **kwargs)

    def make_decoder(self, width: int) -> nn.Module:
        decoder = Decoder(ConditionalDecoderLayer(width), nn.LayerNorm(width))
        decoder.query_scale = MLP(width, width, width)
        decoder.ref_point_head = MLP(width, width, 2)
        decoder.layers[1].ca_qpos_proj = None
        return decoder

    def decode(self, memory: Tensor, query: Tensor, *at: Tensor) -> tuple[Tensor, Tensor]:
        decoder = self.transformer.decoder
        reference = decoder.ref_point_head(query).sigmoid()
        place = sine(reference.flip(-1) * 2 * math.pi, 128).flatten(-2)  # y and then x
        x = torch.zeros_like(query)
        for i, layer in enumerate(decoder.layers):
            scale = decoder.query_scale(x) if i > 0 else 1
            x = layer(x, memory, query, place * scale, *at)
        return decoder.norm(x), F.pad(inverse_sigmoid(reference), (0, 2))


class MSDeformAttn(nn.Module):
    POINTS = 4

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        samples = HEADS * levels * self.POINTS
        self.sampling_offsets = nn.Linear(width, 2 * samples)
        self.attention_weights = nn.Linear(width, samples)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(
        self, query: Tensor, reference: Tensor, x: Tensor, mask: Tensor, shapes: list[tuple]
    ) -> Tensor:
        """``reference`` (B, Q, levels, 2 or 4) in widths and heights of the padded map."""
        value = self.value_proj(x).masked_fill(mask[..., None], 0)
        offsets = self.sampling_offsets(query).unflatten(2, (HEADS, self.levels, self.POINTS, 2))
        weights = self.attention_weights(query).unflatten(2, (HEADS, -1)).softmax(dim=-1)
        weights = weights.unflatten(3, (self.levels, self.POINTS))
        reference = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            places = reference + offsets / torch.tensor([(w, h) for h, w in shapes])[:, None]
        else:
            places = reference[..., :2] + offsets / self.POINTS * reference[..., 2:] / 2
        out = torch.zeros(len(x), query.shape[1], HEADS, value.shape[-1] // HEADS)
        for level, values in enumerate(value.split([h * w for h, w in shapes], dim=1)):
            maps = values.unflatten(2, (HEADS, -1)).permute(0, 2, 3, 1).flatten(0, 1)
            grid = (2 * places[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
            sampled = F.grid_sample(maps.unflatten(2, shapes[level]), grid, align_corners=False)
            sampled = sampled.unflatten(0, (len(x), HEADS)).permute(0, 3, 1, 4, 2)
            out += (sampled * weights[:, :, :, level, :, None]).sum(dim=3)
        return self.output_proj(out.flatten(2))


class DeformableEncoderLayer(nn.Module):
    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width, levels)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, *maps: object) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, reference, x, *maps))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DeformableDecoderLayer(nn.Module):
    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(width, levels)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, query: Tensor, reference: Tensor, memory: Tensor, *maps: object
    ) -> Tensor:
        q = x + query
        x = self.norm2(x + self.self_attn(q, q, x)[0])
        x = self.norm1(x + self.cross_attn(x + query, reference, memory, *maps))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class DeformableDETR(nn.Module):
    def __init__(
        self,
        num_outputs: int = 91,
        width: int = 64,
        refine: bool = False,
        two_stage: bool = False,
        insert_idx: Sequence[int] = (),
        share: bool = False,
        depth: int = 1,
        levels: int = 4,
        dilation: bool = False,
    ) -> None:
        super().__init__()
        decoder = Decoder(DeformableDecoderLayer(width, levels))
        self.transformer = Transformer(
            DeformableEncoderLayer(width, levels), decoder, width, insert_idx, share, depth
        )
        self.transformer.level_embed = nn.Parameter(torch.randn(levels, width))
        num_branches = 2 + two_stage
        class_embed, bbox_embed = nn.Linear(width, num_outputs), MLP(width, width, width, 4)
        if refine:
            self.class_embed, self.bbox_embed = (
                nn.ModuleList(copy.deepcopy(m) for _ in range(num_branches))
                for m in (class_embed, bbox_embed)
            )
            decoder.bbox_embed = self.bbox_embed
        else:
            self.class_embed = nn.ModuleList([class_embed] * num_branches)
            self.bbox_embed = nn.ModuleList([bbox_embed] * num_branches)
        self.refine, self.two_stage = refine, two_stage
        if two_stage:
            decoder.class_embed = self.class_embed
            self.transformer.enc_output = nn.Linear(width, width)
            self.transformer.enc_output_norm = nn.LayerNorm(width)
            self.transformer.pos_trans = nn.Linear(2 * width, 2 * width)
            self.transformer.pos_trans_norm = nn.LayerNorm(2 * width)
        else:
            self.query_embed = nn.Embedding(5, 2 * width)
            self.transformer.reference_points = nn.Linear(width, 2)
        widths = (128, 256, 512) if levels > 1 else (2048 if dilation else 512,)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(32, width))
            for channels in widths
        )
        if levels > 1:
            smaller = nn.Conv2d(512, width, 3, stride=2, padding=1)
            self.input_proj.append(nn.Sequential(smaller, nn.GroupNorm(32, width)))
        self.backbone = nn.Sequential(Body(len(widths), dilation))
        randomize(self)
        if two_stage:  # so that what is no proposal, of which there are many alike, is not the best
            self.transformer.enc_output.bias.data.zero_()

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.backbone[0](images)
        outputs += outputs[-1:] * (len(self.input_proj) - len(outputs))
        maps = [p(x) for p, x in zip(self.input_proj, outputs, strict=True)]
        masks = [resized(mask, x) for x in maps]
        shapes = [x.shape[-2:] for x in maps]
        ratios = torch.stack([self.valid_ratio(m) for m in masks], dim=1)  # (B, levels, 2)
        position = torch.cat(
            [
                position_of(m, x.shape[1], offset=-0.5) + level
                for x, m, level in zip(maps, masks, self.transformer.level_embed, strict=True)
            ],
            dim=1,
        )
        flat_mask = torch.cat([m.flatten(1) for m in masks], dim=1)
        places = torch.cat([self.centers(m) for m in masks], dim=1)
        memory = torch.cat([tokens(x) for x in maps], dim=1)
        memory = self.transformer.encoder(
            memory, position, places[:, :, None] * ratios[:, None], flat_mask, shapes
        )
        if self.two_stage:
            reference, query, x = self.propose(memory, places, flat_mask, shapes)
        else:
            query, x = self.query_embed.weight.expand(len(memory), -1, -1).chunk(2, dim=2)
            reference = self.transformer.reference_points(query).sigmoid()
        for layer, bbox_embed in zip(
            self.transformer.decoder.layers, self.bbox_embed, strict=False
        ):
            repeats = reference.shape[-1] // 2
            at = reference[:, :, None] * ratios.repeat(1, 1, repeats)[:, None]
            x = layer(x, query, at, memory, flat_mask, shapes)
            boxes = bbox_embed(x)
            boxes[..., : 2 * repeats] += inverse_sigmoid(reference)
            boxes = boxes.sigmoid()
            if self.refine:
                reference = boxes
        return self.class_embed[1](x), boxes

    def propose(
        self, memory: Tensor, places: Tensor, mask: Tensor, shapes: list[tuple]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best five boxes of the encoder's outputs, and queries made of them."""
        transformer = self.transformer
        sides = torch.cat([torch.full((h * w, 2), 0.05 * 2**i) for i, (h, w) in enumerate(shapes)])
        proposals = torch.cat([places, sides.expand(len(memory), -1, -1)], dim=2)
        is_valid = ((proposals > 0.01) & (proposals < 0.99)).all(dim=2) & ~mask
        proposals = torch.log(proposals / (1 - proposals))
        proposals = proposals.masked_fill(~is_valid[..., None], torch.inf)
        memory = memory.masked_fill(~is_valid[..., None], 0)
        memory = transformer.enc_output_norm(transformer.enc_output(memory))
        is_object = self.class_embed[2](memory)[..., 0]
        best = is_object.topk(5).indices[..., None]
        boxes = (self.bbox_embed[2](memory) + proposals).gather(1, best.expand(-1, -1, 4)).sigmoid()
        embedding = sine(boxes * 2 * math.pi, 128).flatten(-2)
        query, x = transformer.pos_trans_norm(transformer.pos_trans(embedding)).chunk(2, dim=2)
        return boxes, query, x

    @staticmethod
    def valid_ratio(mask: Tensor) -> Tensor:
        return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], dim=1)

    @classmethod
    def centers(cls, mask: Tensor) -> Tensor:
        """Of all pixels, in widths and heights of the image without its padding: (B, H·W, 2)."""
        h, w = mask.shape[1:]
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        centers = torch.stack([x / w, y / h], dim=2).flatten(0, 1)
        return centers / cls.valid_ratio(mask)[:, None]
