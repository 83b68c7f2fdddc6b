"""Tiny random-weight instances of real library models, each with inputs: what the graph tests run on.

Every entry of `MODELS` is a function without arguments that returns `(model in eval mode, args, kwargs)`. Weights
are seeded, and nothing is left at a constant (zero heads, zero-initialised last norms, unit norm weights and fresh
running statistics would hide mistakes), so a wrong rewrite anywhere moves the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from fewbits.graph import Graph, record

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _liven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every constant parameter and running statistic off its constant, reproducibly."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator).to(x.dtype)

    with torch.no_grad():
        for param in model.parameters():
            if param.numel() and param.is_floating_point() and bool((param == param.flatten()[0]).all()):
                value = float(param.flatten()[0])
                # tiny layer-scale constants (1e-5) would make their branch invisible
                param.copy_((0.0 if value == 0 else 1.0 if abs(value) < 0.1 else value) + 0.1 * noise(param))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_((0.2 * noise(buffer)).exp())
    return model.eval()


def _image(size: int, batch: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def _tokens(vocabulary: int = 64, length: int = 7, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _vision(build: Callable[[], nn.Module], size: int) -> Callable[[], Example]:
    def make() -> Example:
        torch.manual_seed(0)
        return _liven(build()), (_image(size),), {}

    return make


def _text(build: Callable[[], nn.Module], **extra: Any) -> Callable[[], Example]:
    def make() -> Example:
        torch.manual_seed(0)
        return _liven(build()), (), {"input_ids": _tokens(), **extra}

    return make


# -- timm ------------------------------------------------------------------------------------------------------------
def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return build


_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def _efficientformer() -> nn.Module:
    from timm.models.efficientformer import EfficientFormer

    return EfficientFormer(depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, 32), num_classes=10, num_vit=1, mlp_ratios=2)


def _resnet(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models import resnet

        block = getattr(resnet, kind)
        return resnet.ResNet(block, [2, 1, 1, 1], num_classes=10, channels=(8, 12, 16, 24), stem_width=8, **options)

    return build


def _regnet(se_ratio: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.regnet import RegNet, RegNetCfg

        cfg = RegNetCfg(depth=6, w0=8, wa=8.0, wm=1.5, group_size=4, se_ratio=se_ratio, stem_width=8)
        return RegNet(cfg, num_classes=10)

    return build


def _densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_classes=10, bn_size=2)


def _vgg() -> nn.Module:
    from timm.models.vgg import VGG

    return VGG([8, "M", 16, "M", 16, 24, "M"], num_classes=10, mlp_ratio=1 / 128)


# -- torchvision -----------------------------------------------------------------------------------------------------
def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )


def _shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 2, 1], [8, 16, 32, 64, 64], num_classes=10)


def _inception() -> nn.Module:
    from torchvision.models import Inception3

    return Inception3(num_classes=10, aux_logits=False, init_weights=False)


def _mnasnet() -> nn.Module:
    from torchvision.models import MNASNet

    return MNASNet(0.2, num_classes=10)


def _fpn() -> nn.Module:
    from torchvision.models import MobileNetV2
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    body = MobileNetV2(num_classes=10, width_mult=0.2).features[:7]
    return BackboneWithFPN(body, {"3": "0", "6": "1"}, [8, 8], 16)


def _detection_inputs() -> tuple[Any, ...]:
    return ([_image(64)[0].sigmoid()],)


def _retinanet() -> Example:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    model = RetinaNet(
        _fpn(), 4, min_size=64, max_size=64, anchor_generator=anchors, score_thresh=0.0, detections_per_img=20
    )
    return _liven(model), _detection_inputs(), {}


def _faster_rcnn() -> Example:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    model = FasterRCNN(
        _fpn(),
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
        rpn_pre_nms_top_n_test=40,
        rpn_post_nms_top_n_test=10,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        box_head=TwoMLPHead(16 * 9, 32),
        box_predictor=FastRCNNPredictor(32, 4),
        box_score_thresh=0.0,
        box_detections_per_img=20,
    )
    return _liven(model), _detection_inputs(), {}


# -- transformers ----------------------------------------------------------------------------------------------------
def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        return getattr(transformers, model)(made)

    return build


_LM: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_LLAMA = dict(**_LM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
_BERT = dict(**_LM, intermediate_size=48, num_attention_heads=4, max_position_embeddings=32)
_MIXTRAL = dict(**_LLAMA, num_local_experts=3, num_experts_per_tok=2)


def _mixtral(experts: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import MixtralConfig, MixtralForCausalLM

        model = MixtralForCausalLM(MixtralConfig(**_MIXTRAL))
        model.set_experts_implementation(experts)
        return model

    return build


def _bart() -> Example:
    torch.manual_seed(0)
    build = _hf(
        "BartForConditionalGeneration",
        "BartConfig",
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=32,
    )
    return _liven(build()), (), {"input_ids": _tokens(), "decoder_input_ids": _tokens(length=5)}


def _t5() -> Example:
    torch.manual_seed(0)
    build = _hf(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return _liven(build()), (), {"input_ids": _tokens(), "decoder_input_ids": _tokens(length=5)}


def _detr() -> Example:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=6,
        num_labels=5,
    )
    return _liven(DetrForObjectDetection(config)), (), {"pixel_values": _image(64)}


# -- diffusers -------------------------------------------------------------------------------------------------------
def _unet2d() -> Example:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return _liven(model), (_image(16), torch.tensor([7])), {}


def _unet2d_condition() -> Example:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    text = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2))
    return _liven(model), (_image(16, channels=4), torch.tensor([7]), text), {}


MODELS: dict[str, Callable[[], Example]] = {
    "timm-vit": _vision(_timm("vit_tiny_patch16_224", **_VIT), 32),
    "timm-deit-distilled": _vision(_timm("deit_tiny_distilled_patch16_224", **_VIT), 32),
    "timm-swin": _vision(
        _timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
        ),
        32,
    ),
    "timm-mobilevit": _vision(_timm("mobilevit_xxs"), 64),
    "timm-efficientformer": _vision(_efficientformer, 224),
    "timm-resnet": _vision(_resnet("BasicBlock"), 64),
    "timm-resnet-bottleneck": _vision(_resnet("Bottleneck"), 64),
    "timm-regnetx": _vision(_regnet(0.0), 64),
    "timm-regnety": _vision(_regnet(0.25), 64),
    "timm-mobilenetv2": _vision(_timm("mobilenetv2_035"), 64),
    "timm-densenet": _vision(_densenet, 64),
    "timm-vgg": _vision(_vgg, 64),
    "torchvision-vit": _vision(_torchvision_vit, 32),
    "torchvision-shufflenet": _vision(_shufflenet, 64),
    "torchvision-inception": _vision(_inception, 96),
    "torchvision-mnasnet": _vision(_mnasnet, 64),
    "torchvision-retinanet": _retinanet,
    "torchvision-fasterrcnn": _faster_rcnn,
    "hf-llama": _text(_hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA)),
    "hf-qwen3": _text(_hf("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=8)),
    "hf-gemma": _text(_hf("GemmaForCausalLM", "GemmaConfig", **_LLAMA, head_dim=8)),
    "hf-opt": _text(
        _hf(
            "OPTForCausalLM",
            "OPTConfig",
            **_LM,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        )
    ),
    "hf-bloom": _text(_hf("BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "hf-falcon": _text(_hf("FalconForCausalLM", "FalconConfig", **_LM, num_attention_heads=4)),
    "hf-gpt2": _text(
        _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    ),
    "hf-gpt-neo": _text(
        _hf(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            max_position_embeddings=32,
            window_size=4,
        )
    ),
    "hf-bert": _text(_hf("BertForSequenceClassification", "BertConfig", **_BERT)),
    "hf-roberta": _text(_hf("RobertaForSequenceClassification", "RobertaConfig", **_BERT)),
    "hf-bart": _bart,
    "hf-t5": _t5,
    "hf-mixtral-eager": _text(_mixtral("eager")),
    "hf-mixtral-grouped": _text(_mixtral("grouped_mm")),
    "hf-detr": _detr,
    "diffusers-unet2d": _unet2d,
    "diffusers-unet2d-condition": _unet2d_condition,
}
NAMES = tuple(MODELS)


@cache
def build(name: str) -> Example:
    """One instance a process, for tests that leave it as it is."""
    return MODELS[name]()


@cache
def recorded(name: str) -> Graph:
    """The recorded forward of `build(name)`."""
    model, args, kwargs = build(name)
    return record(model, *args, **kwargs)
