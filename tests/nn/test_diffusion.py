import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import nn

from hasten.nn import LinearSkip, dit, unet


def small_dit(**kwargs):
    return dit(1, 8, patch_size=2, width=32, depth=2, heads=2, **kwargs)


class Nothing(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


def target(scheduler, x0, noise, t):
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(x0, noise, t)
    return noise if kind == "epsilon" else x0


# ------------------------------------------------------------------ linear skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 300, 999])
def test_the_skip_is_the_least_squares_line_through_the_origin(prediction_type, t):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x0 = torch.rand(4000, 1, 8, 8, dtype=torch.double) * 1.5 - 1  # its mean is not 0, its mean square is 0.25
    noise, times = torch.randn_like(x0), torch.full((len(x0),), t)
    noisy = scheduler.add_noise(x0, noise, times)
    slope = (noisy * target(scheduler, x0, noise, times)).sum() / noisy.square().sum()
    skip = LinearSkip(Nothing(), scheduler, data_var=x0.square().mean().item())
    assert skip.coefficients[t].item() == pytest.approx(slope.item(), abs=5e-3)


def test_the_guesses_of_noise_velocity_and_image_are_one_guess():
    x, t = torch.randn(5, 3, 4, 4), torch.tensor([0, 10, 250, 700, 999])
    abar = DDPMScheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    eps, v, x0 = (
        LinearSkip(Nothing(), DDPMScheduler(prediction_type=kind), data_var=0.3)(x, t)
        for kind in ("epsilon", "v_prediction", "sample")
    )
    torch.testing.assert_close(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, x)
    torch.testing.assert_close(abar.sqrt() * eps - (1 - abar).sqrt() * x0, v)


def test_the_skip_passes_labels_on_and_takes_an_object_with_sample():
    model = unet(1, 8, num_classes=10, widths=(16,))
    nn.init.normal_(model.conv_out.weight)
    skip = LinearSkip(model, DDPMScheduler(), data_var=0.5)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([10, 4])
    guess = skip.coefficients[t].view(-1, 1, 1, 1) * x
    torch.testing.assert_close(skip(x, t, class_labels=labels), model(x, t, class_labels=labels).sample + guess)


def test_the_skip_adds_nothing_to_the_state_dict():
    skip = LinearSkip(nn.Linear(1, 1), DDPMScheduler(), data_var=0.5)
    assert set(skip.state_dict()) == {"model.weight", "model.bias"}


def test_the_skip_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match=r"data_var: expected > 0, got 0.0"):
        LinearSkip(Nothing(), DDPMScheduler(), data_var=0.0)
    scheduler = DDPMScheduler(prediction_type="flow")
    with pytest.raises(ValueError, match=r"expected one of epsilon, v_prediction, sample, got 'flow'"):
        LinearSkip(Nothing(), scheduler, data_var=0.5)


# ------------------------------------------------------------------ DiT


def test_a_fresh_dit_predicts_zero_and_its_blocks_are_the_identity():
    model = small_dit(num_classes=10)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999]), torch.tensor([0, 9, 10])
    assert model(x, t, labels).sample.abs().max() == 0
    tokens = torch.randn(3, 16, 32)
    for block in model.transformer_blocks:
        assert torch.equal(block(tokens, timestep=t, class_labels=labels), tokens)


def test_a_dit_learns_from_its_first_steps():
    model = small_dit()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # zeros open one layer after the other
        optimizer.zero_grad()
        (model(x, t).sample - x).square().mean().backward()
        optimizer.step()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


def test_a_dit_in_training_draws_nothing_so_no_block_drops_labels():
    model = small_dit(num_classes=10).train()
    before = torch.get_rng_state()
    model(torch.randn(4, 1, 8, 8, generator=torch.Generator()), torch.arange(4), class_labels=torch.arange(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dit_has_an_embedding_for_no_label():
    model = small_dit(num_classes=3)
    nn.init.normal_(model.proj_out_1.weight)
    nn.init.normal_(model.proj_out_2.weight)
    x, t = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 7)
    out = model(x, t, class_labels=torch.arange(4)).sample
    assert not any(torch.equal(out[i], out[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("how", ["positional", "keyword", "none"])
def test_a_dit_without_labels_uses_label_zero(how):
    model = small_dit()
    nn.init.normal_(model.proj_out_2.weight)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    wanted = model(x, t, class_labels=torch.zeros(2, dtype=torch.long)).sample
    calls = {
        "positional": lambda: model(x, t),
        "keyword": lambda: model(x, timestep=t),
        "none": lambda: model(x, t, class_labels=None),
    }
    assert torch.equal(calls[how]().sample, wanted)


def test_a_dit_stays_a_diffusers_model():
    model = small_dit(num_classes=10)
    assert type(model) is DiTTransformer2DModel
    again = DiTTransformer2DModel.from_config(model.config)
    again.load_state_dict(model.state_dict())


def test_dit_small_has_the_papers_size():
    parameters = sum(p.numel() for p in dit(3, 32, num_classes=10).parameters())
    assert parameters == pytest.approx(33e6, rel=0.1)  # beside the 33M of DiT-S, an embedder of t in every block


def test_dit_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"image_size: expected a multiple of patch_size = 3, got 8"):
        dit(1, 8, patch_size=3)
    with pytest.raises(ValueError, match=r"width: expected a multiple of heads = 5, got 32"):
        dit(1, 8, width=32, heads=5)


# ------------------------------------------------------------------ U-Net


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_fresh_unet_predicts_zero(num_classes):
    model = unet(3, 8, num_classes=num_classes, widths=(16, 32), attention=(4,))
    labels = {} if num_classes is None else {"class_labels": torch.tensor([0, 10])}
    out = model(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), **labels).sample
    assert out.shape == (2, 3, 8, 8)
    assert out.abs().max() == 0


def test_the_residual_branches_of_a_fresh_unet_are_zero():
    model = unet(1, 8, widths=(16, 32), attention=(8,))
    x, temb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    block = model.down_blocks[0]
    assert torch.equal(block.resnets[0](x, temb), x)
    assert torch.equal(block.attentions[0](x), x)


def test_a_unet_attends_where_asked():
    model = unet(1, 16, widths=(16, 16, 16), attention=(8,))
    assert isinstance(model, UNet2DModel)
    kinds = [type(block).__name__ for block in (*model.down_blocks, *model.up_blocks)]
    plain, attending = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    assert kinds == [plain[0], attending[0], plain[0], plain[1], attending[1], plain[1]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": ()}, r"widths: expected at least one, each >= 1, got \[\]"),
        ({"widths": (16, 16, 16, 16, 16)}, "image_size: expected a multiple of 16 for 5 widths, got 8"),
        ({"widths": (32, 36)}, r"widths: expected multiples of 8 \(norm groups\), got \[32, 36\]"),
        ({"attention": (16,)}, r"attention: expected sides among \[8, 4\], got \[16\]"),
    ],
)
def test_unet_refuses_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        unet(1, 8, **{"widths": (16, 32), **changes})
