"""Where the tiny VAE's training starts: an encoder that already computes the principal components of patches.

A deep auto-encoder from random weights finds one component after another, slowly: after 1,000 steps its
loss was 1.0, against 0.29 from here. The 16 leading components of 8 x 8 patches alone rebuild the held-out
images with 26.2 dB (block by block, by a linear decoder). So the encoder's linear path is set to them, and
training spends its time on the decoder and on what is not linear.

Shapes: N images, C channels, H W pixels, K kept components.
"""

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

QUIET_LOGVAR = -6.0  # the posterior's log-variance: the decoder sees the mean from the first step
PAIR_GAIN = 1.7  # about the standard deviation that the encoder's last normalisation divides by


def set_taps(conv: nn.Module, taps_OIhw: Tensor, bias_O: Tensor | None = None, *, at: int = 0) -> None:
    """Zero a convolution, then put taps into its first channels, the first at kernel position (at, at)."""
    conv = cast(nn.Conv2d, conv)
    outputs, inputs, height, width = taps_OIhw.shape
    conv.weight.zero_()
    cast(Tensor, conv.bias).zero_()
    conv.weight[:outputs, :inputs, at : at + height, at : at + width] = taps_OIhw
    if bias_O is not None:
        cast(Tensor, conv.bias)[: len(bias_O)] = bias_O


def components(x_NCHW: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of the channels: mean_C, leading basis_KC, and their standard deviations std_K."""
    rows_MC = x_NCHW.movedim(1, -1).flatten(0, 2)
    variances_C, basis_CC = torch.linalg.eigh(torch.cov(rows_MC.T))
    std_K = variances_C[-count:].flip(0).clamp(min=0).sqrt()
    return rows_MC.mean(0), basis_CC[:, -count:].T.flip(0), std_K


def silence_residual_branches(vae: AutoencoderKL) -> None:
    """Zero the end of every residual branch: the network begins as its shortcuts, nearly linear."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(cast(nn.Conv2d, module.conv2).weight)
            nn.init.zeros_(cast(Tensor, module.conv2.bias))


def start_encoder(vae: AutoencoderKL, images_NCHW: Tensor) -> None:
    """Set the encoder to the leading components of the images' 8 x 8 patches; images in [-1, 1].

    Space-to-depth is a stride-2 convolution that uses its first 2 x 2 taps, three times in a row (the 48
    numbers of a 4 x 4 patch shrink to the channels there by their own principal components). Each final
    component is scaled by 1 / sqrt(std), half-way to whitening. The encoder ends in normalisation and SiLU: a
    component goes there as a pair (+a, -a), as silu(a) - silu(-a) = a. Constants in the unused channels keep
    the normalisation from dividing by the image's own contrast.
    """
    encoder, keep = vae.encoder, int(vae.config["latent_channels"])
    blocks = [cast(nn.Module, block) for block in encoder.down_blocks]
    down = [cast(nn.Conv2d, block.get_submodule("downsamplers.0.conv")) for block in blocks[:3]]
    shortcuts = [cast(nn.Conv2d, block.get_submodule("resnets.0.conv_shortcut")) for block in blocks[1:]]
    for shortcut in shortcuts:
        nn.init.dirac_(shortcut.weight)
        cast(Tensor, shortcut.bias).zero_()
    set_taps(encoder.conv_in, torch.eye(3)[:, :, None, None], at=1)

    set_taps(down[0], torch.eye(12).view(12, 3, 2, 2))
    two_NCHW = F.pixel_unshuffle(F.pixel_unshuffle(images_NCHW, 2), 2)
    count = min(down[1].out_channels, 48)
    _, basis_KC, _ = components(two_NCHW, count)
    set_taps(down[1], basis_KC.view(count, 12, 2, 2))

    three_NCHW = F.pixel_unshuffle(torch.einsum("kc,nchw->nkhw", basis_KC, two_NCHW), 2)
    mean_C, basis_KC, std_K = components(three_NCHW, keep)
    basis_KC = basis_KC / std_K.sqrt()[:, None] / std_K.mean().sqrt()
    shift_K = -(basis_KC @ mean_C)
    pairs_PC, shift_P = torch.cat([basis_KC, -basis_KC]), torch.cat([shift_K, -shift_K])
    set_taps(down[2], pairs_PC.view(2 * keep, count, 2, 2), shift_P)

    free = cast(Tensor, shortcuts[2].bias)[2 * keep :]
    free.copy_(2.0 * (torch.arange(len(free)) % 2 * 2 - 1))
    pair_KP = PAIR_GAIN * torch.cat([torch.eye(keep), -torch.eye(keep)], dim=1)
    set_taps(encoder.conv_out, pair_KP[:, :, None, None], at=1)
    cast(Tensor, encoder.conv_out.bias)[keep:] = QUIET_LOGVAR


def start_decoder(vae: AutoencoderKL) -> None:
    """Let the decoder's linear path pass its input upwards: identities; orthogonal rows where it narrows."""
    nn.init.dirac_(vae.decoder.conv_in.weight)
    for name, module in vae.decoder.named_modules():
        if name.endswith("upsamplers.0.conv"):
            nn.init.dirac_(cast(nn.Conv2d, module).weight)
        if name.endswith("resnets.0.conv_shortcut"):
            nn.init.orthogonal_(cast(nn.Conv2d, module).weight)


@torch.no_grad()
def start_from_patches(vae: AutoencoderKL, images_NCHW: Tensor) -> None:
    """Prepare an untrained VAE in place, from images in [-1, 1] with sides divisible by 8.

    Raises ValueError if the channels can not hold the pairs of components.
    """
    width, keep = vae.config["block_out_channels"], vae.config["latent_channels"]
    if width[0] < 12 or width[2] < 2 * keep or list(width) != sorted(set(width)):
        raise ValueError(
            f"channels {tuple(width)} do not fit {keep} latent channels: each must be larger than the one "
            f"before, the first at least 12, the third at least 2 * {keep}. Widen `channels`, or lower "
            f"`latent_channels`."
        )
    silence_residual_branches(vae)
    start_encoder(vae, images_NCHW)
    start_decoder(vae)
