"""Diffusers pipelines of a few thousand random weights, encoders and tokenizers included, made without a network connection."""

import json

import pytest
import torch

from markovia.envs.denoising.unet import UNetDenoiser

diffusers = pytest.importorskip("diffusers")
LETTERS = [chr(i) for i in range(97, 123)]
LENGTH = 12  # tokens of a prompt
PROMPTS = ["a cat", "two dogs"]


def unet():
    torch.manual_seed(0)
    return UNetDenoiser((1, 8, 8), (8, 16)).model


def ddpm_pipeline():
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())


def ddim_pipeline():
    return diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))


def tiny_vae(planes, **config):
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=planes, norm_num_groups=4, sample_size=16, **{"scaling_factor": 0.5, **config},
    )  # fmt: skip


def shaken(network, scale=0.1):
    """The network with random weights everywhere: transformers start at zero outputs, which no condition could change."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=scale)
    return network


def dit_pipeline():
    """Latents, class labels, guidance, and a network that predicts its variance too."""
    torch.manual_seed(2)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2,
        norm_num_groups=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(shaken(transformer), tiny_vae(4), diffusers.DDIMScheduler(clip_sample=False))


def clip_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    tokens = [*LETTERS, *[c + "</w>" for c in LETTERS], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def clip_encoder(width=16, projection=None):
    """CLIP's text model, with a projection of the pooled output where its width is given."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=projection or width,
    )  # fmt: skip
    return (transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection)(config).eval()


def t5_tokenizer():
    transformers = pytest.importorskip("transformers")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *[(c, -3.0) for c in LETTERS]]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)


def t5_encoder(width=32):
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def stable_diffusion(folder, scheduler=None):
    """Latents, prompts, guidance: a Stable Diffusion pipeline of about 100,000 parameters."""
    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(3)
    text = clip_encoder()
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        tiny_vae(4), text, tokenizer, network, scheduler or diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder, scheduler=None, vae=None, told_guidance=False):
    """SDXL: two text encoders, pooled embeddings and time ids as added conditions; `told_guidance` as in consistency-distilled ones."""
    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(4)
    first, second = clip_encoder(16), clip_encoder(16, projection=16)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=1,
        use_linear_projection=True, time_cond_proj_dim=16 if told_guidance else None,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae or tiny_vae(4), first, second, tokenizer, tokenizer, shaken(network) if told_guidance else network,
        scheduler or diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), add_watermarker=False,
    )  # fmt: skip


def sd3(folder, t5=True, **schedule):
    """Stable Diffusion 3: a multimodal transformer, flow matching, two CLIP encoders and T5 (or zeros in its place)."""
    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(5)
    first, second = clip_encoder(16, projection=16), clip_encoder(16, projection=16)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        shaken(network), diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **schedule}), tiny_vae(4, shift_factor=0.1),
        first, tokenizer, second, tokenizer, t5_encoder() if t5 else None, t5_tokenizer() if t5 else None,
    )  # fmt: skip


def pixart(sigma=False):
    """PixArt-alpha or -Sigma: T5 with an attention mask, a transformer that predicts its variance too."""
    torch.manual_seed(6)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=16, sample_size=8, patch_size=2,
        norm_num_groups=4, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    return kind(t5_tokenizer(), t5_encoder(), tiny_vae(4), shaken(network), diffusers.DDIMScheduler(clip_sample=False))


def flux(folder, told_guidance=True):
    """Flux: packed latents, a schedule shifted by the image's size, rotary positions; `told_guidance` as in the guidance-distilled ones."""
    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(7)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, guidance_embeds=told_guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.FluxPipeline(
        scheduler, tiny_vae(4, shift_factor=0.1), clip_encoder(16), tokenizer, t5_encoder(), t5_tokenizer(), shaken(network)
    )
