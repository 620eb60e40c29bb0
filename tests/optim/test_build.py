import torch
from torch import nn

from hasten.optim import configure_optimizers, parameter_groups


class WithTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, 3))

    def no_weight_decay(self):
        return {"pos_embed"}


def test_weights_decay_and_vectors_and_exempt_names_do_not():
    model = WithTokens()
    decayed, plain = parameter_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert {id(p) for p in plain["params"]} == {
        id(model.linear.bias), id(model.norm.weight), id(model.norm.bias), id(model.pos_embed)
    }  # fmt: skip
    assert "weight_decay" not in decayed and plain["weight_decay"] == 0.0


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model)
    assert [id(p) for p in group["params"]] == [id(model.bias)]


def test_tied_parameters_appear_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model)
    assert len(group["params"]) == 1


def test_a_schedule_that_wants_total_steps_gets_them_and_another_is_left_alone():
    groups = parameter_groups(nn.Linear(3, 3))
    asked = []

    def total_steps():
        asked.append(1)
        return 7

    def wants(optimizer, total_steps):
        return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=total_steps)

    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1)

    made = configure_optimizers(groups, sgd, wants, total_steps)
    assert made["lr_scheduler"]["scheduler"].total_iters == 7 and made["lr_scheduler"]["interval"] == "step"
    configure_optimizers(groups, sgd, torch.optim.lr_scheduler.ConstantLR, total_steps)
    assert configure_optimizers(groups, sgd, None, total_steps).keys() == {"optimizer"}
    assert asked == [1]
