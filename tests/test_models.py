"""The contract that every method signs, whatever it is inside; an exemption is listed with its reason.

Small and asymmetric on purpose: users with different numbers of choices, ties and weights, more texts than choices need.
"""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

import palate
import palate.models
from palate.adaptation import no_pairs
from palate.data.embeddings import OneHot
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, MismatchError, UnknownUserError
from palate.models import crowd, files
from palate.models.base import RewardModel
from palate.models.meta import ExactSolve, Outer
from palate.models.subspace import Subspace

SIDES = ("one", "other")  # of taste, by number; known of everybody in the data, under another name too (`renamed`)
TABLE = {name: {"side": SIDES[i % 2]} for i in range(24) for name in (f"u{i:02d}", f"person {99 - i}")}
METHODS: dict[str, Callable[[], RewardModel]] = {
    "bt": lambda: palate.BradleyTerry(),
    "lore": lambda: palate.LoRe(3, steps=40),
    "lore-faithful": lambda: palate.LoRe.faithful(3),
    "pref": lambda: palate.PReF((2, 3)),
    "pref-faithful": lambda: palate.PReF.faithful(3, few_shot_steps=100),
    "hierarchical": lambda: palate.Hierarchical(4, bend=6, types=(2,)),
    "gaussian": lambda: palate.Hierarchical(4, bend=0, types=(), kappa=1.0),
    "nobody differs": lambda: palate.Hierarchical(4, bend=0, kappa=0.0),
    "mrm": lambda: palate.MRM(3, inner=ExactSolve(), outer=Outer(0.05, 64, 4, "constant", warmup=0.0, ridge=1e-3)),
    "mrm-faithful": lambda: palate.MRM.faithful(inner_rate=1.0, outer_rate=0.1, epochs=20),
    "pal-a": lambda: palate.PAL(3),
    "pal-a-faithful": lambda: palate.PAL.faithful(2, hidden=(6,), width=4, few_shot_epochs=3),
    "pal-b": lambda: palate.PAL(2, by_prompt=True, width=5),
    "pal-b-faithful": lambda: palate.PAL.faithful(2, by_prompt=True, hidden=(6,), width=4, few_shot_epochs=3),
    "vpl": lambda: palate.VPL((2,), hidden=4, epochs=6),
    "vpl-faithful": lambda: palate.VPL.faithful(3, hidden=8, epochs=1),
    "individual": lambda: palate.IndividualBT(),
    "individual-crowd": lambda: palate.IndividualBT(around_crowd=True),
    "groups": lambda: palate.GroupBT(),
    "neighbours": lambda: palate.Neighbours(),
    "attributes": lambda: palate.AttributePrior(TABLE, base=palate.Hierarchical(4, bend=0, types=(), kappa=1.0), effect=0.3),
    "scorers": lambda: palate.GivenBases(),
    "scorers, signed": lambda: palate.GivenBases("signed"),
    "scorers, mixed": lambda: palate.GivenBases("simplex"),
}
CLASSES = {
    "pref": "PReF",
    "pref-faithful": "PReF",
    "bt": "BradleyTerry",
    "lore": "LoRe",
    "lore-faithful": "LoRe",
}  # the others are Hierarchical
CLASSES |= {"mrm": "MRM", "mrm-faithful": "MRM"}
CLASSES |= dict.fromkeys(("pal-a", "pal-a-faithful", "pal-b", "pal-b-faithful"), "PAL") | {"vpl": "VPL", "vpl-faithful": "VPL"}
CLASSES |= {"individual": "IndividualBT", "individual-crowd": "IndividualBT", "groups": "GroupBT", "neighbours": "Neighbours"}
CLASSES |= {"attributes": "AttributePrior"}
CLASSES |= dict.fromkeys(("scorers", "scorers, signed", "scorers, mixed"), "GivenBases")
EXEMPT = {"Reference"}  # nothing is fitted, and it needs an encoder with a head: its contract is tests/test_reference.py
IN_ORDER = ("pal-a-faithful", "pal-b-faithful")  # mini-batches of a user's choices in the order they came, from a random start
IMPERSONAL = ("bt", "nobody differs")  # one reward for everybody, on purpose
EVERY = pytest.mark.parametrize("name", METHODS)


def arrays(n_users: int, seed: int = 0, dim: int = 5, least: int = 3) -> dict[str, np.ndarray]:
    """Users with `least` to `least` + 5 choices of a planted two-sided taste, shuffled, with weights and a few ties.

    Prompts have something in common, as texts do: a point that depends on the prompt can be the same under all of them.
    """
    rng = np.random.default_rng(seed)
    counts = least + np.arange(n_users) % 6
    users = np.repeat([f"u{u:02d}" for u in rng.permutation(n_users)], counts)
    taste = {user: np.array([1.5, 0, 0, 0, 0]) + np.eye(5)[1] * (3 if int(user[1:]) % 2 else -3) for user in users}
    table = rng.standard_normal((2 * len(users) + 7, dim)).astype(np.float32)
    place = rng.permutation(len(table))
    table[place[2 * len(users) :], 4] += 3
    a, b = place[: len(users)], place[len(users) : 2 * len(users)]
    margin = np.array([(table[i] - table[j]) @ taste[user] for i, j, user in zip(a, b, users, strict=True)])
    first = rng.random(len(users)) < 1 / (1 + np.exp(-margin))
    order = rng.permutation(len(users))
    return {
        "embeddings": table,
        "chosen": np.where(first, a, b)[order],
        "rejected": np.where(first, b, a)[order],
        "users": users[order],
        "tie": (rng.random(len(users)) < 0.1)[order],
        "weight": rng.choice([0.5, 1.0, 2.0], len(users))[order],
        "prompts": rng.choice(place[2 * len(users) :], len(users)),
    }


def pairs_of(columns: dict[str, np.ndarray], **changes: np.ndarray) -> EmbeddedPairs:
    a = {**columns, **changes}
    return EmbeddedPairs(
        a["embeddings"],
        a["chosen"],
        a["rejected"],
        a["users"],
        tie=a["tie"],
        weight=a["weight"],
        prompts=a["prompts"],
        encoder="enc",
    )


def taken(columns: dict[str, np.ndarray], rows: np.ndarray) -> EmbeddedPairs:
    return pairs_of({key: column if key == "embeddings" else column[rows] for key, column in columns.items()})


COLUMNS, OTHERS = arrays(24, least=20), arrays(9, seed=5)  # so many that held-out users gain by each method's weights
FITTED: dict[str, RewardModel] = {}


def fitted(name: str) -> RewardModel:
    if name not in FITTED:
        FITTED[name] = palate.fit(pairs_of(COLUMNS), METHODS[name](), seed=3)
    return FITTED[name]


def everybody() -> EmbeddedPairs:
    return pairs_of(OTHERS)


# -- who is here


def test_every_class_is_under_contract_and_can_be_saved() -> None:
    for module in pkgutil.iter_modules(palate.models.__path__):
        importlib.import_module(f"palate.models.{module.name}")
    found: set[str] = set()
    waiting = [RewardModel]
    while waiting:
        below = [kind for kind in waiting.pop().__subclasses__() if kind.__module__.startswith("palate.")]
        waiting += below
        found |= {kind.__name__ for kind in below}
    assert len(found) == 13
    assert found == files.KINDS.keys() == {type(make()).__name__ for make in METHODS.values()} | EXEMPT
    assert all(type(make()).__name__ == CLASSES.get(name, "Hierarchical") for name, make in METHODS.items())


@EVERY
def test_an_unfitted_model_says_so(name: str) -> None:
    model = METHODS[name]()
    assert not model.is_fitted
    for attempt in (lambda: palate.adapt(model, everybody()), lambda: palate.margins(model, everybody())):
        with pytest.raises(DataError, match=r"is not fitted; call palate\.fit\(data, model\) and use what it returns"):
            attempt()


@EVERY
def test_options_make_the_same_model_and_survive_json(name: str) -> None:
    import json

    model = METHODS[name]()
    again = type(model).from_options(json.loads(json.dumps(model.options())))
    assert again.fingerprint() == model.fingerprint()
    if model.linear:
        assert type(again.inference) is type(model.inference)
    assert repr(model).startswith(type(model).__name__ + "(")


@EVERY
def test_every_method_has_found_that_people_differ(name: str) -> None:
    """Without it the tests below would be about the crowd's reward only, under many names."""
    model, data = fitted(name), everybody()
    profiles = palate.adapt(model, data)
    apart = float((palate.margins(model, data, profiles) - palate.margins(model, data)).abs().max())
    if name in IMPERSONAL:
        assert (model.n_weights, apart) == (0, 0.0)
        return
    assert model.n_weights > 0
    assert profiles.mean.shape == (len(data.user_ids), model.n_weights)
    assert apart > 0.02
    assert float(profiles.mean.std(0).max()) > 1e-3  # and from one to another


def test_the_attributes_under_contract_say_something() -> None:
    model = fitted("attributes")
    assert isinstance(model, palate.AttributePrior)
    one, other, nobody = model.expected(["u01", "u02", "stranger"])
    assert float((one - other).norm()) > 0.1
    assert torch.equal(nobody, model.crowd_weights)


# -- margins


@EVERY
def test_swapping_the_sides_negates_every_margin(name: str) -> None:
    model, data = fitted(name), everybody()
    profiles = palate.adapt(model, data)
    for known in (None, profiles):
        there, back = palate.margins(model, data, known), palate.margins(model, data.swapped(), known)
        assert torch.equal(there, -back)
        assert there.shape == (len(data),)


@EVERY
def test_margins_are_differences_of_scores(name: str) -> None:
    model, data = fitted(name), everybody()
    profiles = palate.adapt(model, data)
    features = model.features(data.embeddings)
    for user in data.user_ids[:3]:
        weights, mine = profiles[user].mean, data.of_users([user])
        rows = [features[mine.chosen], features[mine.rejected]]
        if model.reads_prompts:
            assert mine.prompts is not None
            rows = [model.under(part, features[mine.prompts]) for part in rows]
        chosen, rejected = (model.score(part, weights) for part in rows)
        torch.testing.assert_close(palate.margins(model, mine, profiles), chosen - rejected)
    if model.reads_prompts and model.n_weights:
        with pytest.raises(DataError, match="depends on the prompt"):
            model(data.embeddings.rows(torch.arange(4)))
        return
    torch.testing.assert_close(model(data.embeddings.rows(torch.arange(4))), model.score(features[:4], model.crowd_weights))


@EVERY
def test_the_order_of_choices_changes_nothing(name: str) -> None:
    if name in IN_ORDER:
        pytest.skip("the published few-shot loop takes a user's choices four at a time")
    model = fitted(name)
    order = np.random.default_rng(1).permutation(len(OTHERS["users"]))
    data, shuffled = everybody(), taken(OTHERS, order)
    ours, theirs = palate.adapt(model, data), palate.adapt(model, shuffled)
    assert ours.user_ids == theirs.user_ids
    torch.testing.assert_close(ours.mean, theirs.mean, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        palate.margins(model, data, ours)[order], palate.margins(model, shuffled, theirs), atol=1e-4, rtol=1e-4
    )


@EVERY
def test_a_batch_is_the_loop_over_users_and_nobody_changes_another(name: str) -> None:
    model, data = fitted(name), everybody()
    together = palate.adapt(model, data)
    for user in data.user_ids:
        alone = palate.adapt(model, data.of_users([user]))
        torch.testing.assert_close(alone[user].mean, together[user].mean, atol=2e-5, rtol=1e-4)
        assert (alone[user].n_pairs, alone[user].converged) == (together[user].n_pairs, together[user].converged)
        if (spread := together[user].covariance) is not None:
            torch.testing.assert_close(alone[user].covariance, spread, atol=2e-5, rtol=1e-4)
    few = palate.adapt(model, data.of_users(data.user_ids[2:7]))
    torch.testing.assert_close(few.mean, together.mean[2:7], atol=2e-5, rtol=1e-4)


@EVERY
def test_another_name_gives_the_same_profile(name: str) -> None:
    if name in ("lore-faithful", "pref-faithful", *IN_ORDER):
        pytest.skip("the published start is random, and here it is drawn from the user's id")
    renamed = np.array([f"person {99 - int(user[1:])}" for user in OTHERS["users"]])  # the other way round when sorted
    ours, theirs = palate.adapt(fitted(name), everybody()), palate.adapt(fitted(name), pairs_of(OTHERS, users=renamed))
    for user in ours:
        torch.testing.assert_close(theirs[f"person {99 - int(user[1:])}"].mean, ours[user].mean, atol=2e-5, rtol=1e-4)


@EVERY
def test_somebody_of_whom_nothing_is_known_gets_the_crowds_reward(name: str) -> None:
    model, data = fitted(name), pairs_of(OTHERS, users=np.char.add("stranger ", OTHERS["users"]))  # in no table of attributes
    crowd_margins = palate.margins(model, data)
    torch.testing.assert_close(palate.margins(model, data, no_pairs(model, data.user_ids)), crowd_margins)
    known = palate.adapt(model, data.of_users(data.user_ids[:1]))
    mixed = palate.margins(model, data, known)
    strangers = data.user_index != 0
    torch.testing.assert_close(mixed[strangers], crowd_margins[strangers], atol=1e-6, rtol=1e-5)
    with pytest.raises(UnknownUserError, match=f"no profile for user '{data.user_ids[1]}' among 1"):
        _ = known[data.user_ids[1]]


@EVERY
def test_a_covariance_is_one_and_shrinks_with_choices(name: str) -> None:
    model, data = fitted(name), everybody()
    profiles = palate.adapt(model, data)
    if model.prior is None:
        assert profiles.covariance is None or profiles.covariance.numel() == 0
        return
    assert profiles.covariance is not None
    torch.testing.assert_close(profiles.covariance, profiles.covariance.mT, atol=1e-6, rtol=1e-4)
    assert float(torch.linalg.eigvalsh(profiles.covariance).min()) > 0
    if model.prior.n_components == 1:
        assert float(torch.linalg.eigvalsh(model.prior.covariance - profiles.covariance).min()) > -1e-5


# -- weights and ties


@EVERY
def test_a_choice_of_weight_two_is_a_choice_said_twice(name: str) -> None:
    if name in (*IN_ORDER, "vpl-faithful"):
        pytest.skip("the published code has no weights; ours scale a choice's share, and saying it twice takes another step")
    model, n = fitted(name), len(OTHERS["users"])
    weight = np.ones(n)
    weight[::3] = 2
    twice = taken({**OTHERS, "weight": np.ones(n)}, np.concatenate([np.arange(n), np.arange(n)[::3]]))
    ours, theirs = palate.adapt(model, pairs_of(OTHERS, weight=weight)), palate.adapt(model, twice)
    torch.testing.assert_close(ours.mean, theirs.mean, atol=2e-5, rtol=1e-3)


@EVERY
def test_a_tie_is_half_a_choice_each_way(name: str) -> None:
    if name in (*IN_ORDER, "vpl-faithful"):
        pytest.skip("the published code has no ties, and its own steps see two half choices as two")
    model, n, rng = fitted(name), len(OTHERS["users"]), np.random.default_rng(2)
    tie = rng.random(n) < 0.4
    both = {
        key: np.concatenate([OTHERS[key], OTHERS[other][tie]])
        for key, other in (("chosen", "rejected"), ("rejected", "chosen"), ("users", "users"), ("prompts", "prompts"))
    }
    halves = {"weight": np.concatenate([np.where(tie, 0.5, 1.0), np.full(tie.sum(), 0.5)]), "tie": np.zeros(n + tie.sum(), bool)}
    apart = pairs_of({**OTHERS, **both, **halves})
    ours = palate.adapt(model, pairs_of(OTHERS, tie=tie, weight=np.ones(n)))
    torch.testing.assert_close(ours.mean, palate.adapt(model, apart).mean, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["bt", "lore", "gaussian"])
def test_fit_does_not_see_the_order_of_choices(name: str) -> None:
    """With too few users to hold any out. Elsewhere the held-out halves are drawn by position, so a choice may fall otherwise."""
    order = np.random.default_rng(3).permutation(len(OTHERS["users"]))
    ours, theirs = (palate.fit(data, METHODS[name]()) for data in (everybody(), taken(OTHERS, order)))
    data = everybody()
    for a, b in ((None, None), (palate.adapt(ours, data), palate.adapt(theirs, data))):
        torch.testing.assert_close(palate.margins(ours, data, a), palate.margins(theirs, data, b), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["bt", "lore"])
def test_fit_sees_ties_and_weights_as_adapt_does(name: str) -> None:
    """Hierarchical is exempt: it scales its bases by the margins of the rows there are, whatever they weigh."""
    n = len(OTHERS["users"])
    rows = np.concatenate([np.arange(n), np.arange(n)[::3]])
    weight = np.ones(n)
    weight[::3] = 2
    ours = palate.fit(pairs_of(OTHERS, weight=weight), METHODS[name]())
    theirs = palate.fit(taken({**OTHERS, "weight": np.ones(n)}, rows), METHODS[name]())
    torch.testing.assert_close(palate.margins(ours, everybody()), palate.margins(theirs, everybody()), atol=2e-3, rtol=2e-3)


# -- what belongs together


@EVERY
def test_embeddings_of_another_encoder_or_width_are_refused(name: str) -> None:
    model, data = fitted(name), everybody()
    assert model.encoder == "enc"
    other = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users, encoder="another one")
    narrow = EmbeddedPairs(OTHERS["embeddings"][:, :4], data.chosen, data.rejected, data.users)
    for attempt in (palate.adapt, palate.margins):
        with pytest.raises(MismatchError, match="embeddings of encoder another one given to a model fitted on encoder enc"):
            attempt(model, other)
        with pytest.raises(DataError, match=r"embeddings have 4 columns; .* was fitted on 5"):
            attempt(model, narrow)
    with pytest.raises(DataError, match="embeddings have 2 columns"):
        model(torch.ones(3, 2))


@EVERY
def test_profiles_of_another_model_are_refused(name: str) -> None:
    data = everybody()
    for other in METHODS.keys() - {name}:
        with pytest.raises(MismatchError, match="weights mean nothing under another model: adapt again"):
            palate.margins(fitted(name), data, palate.adapt(fitted(other), data))


@EVERY
def test_a_model_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    model, data = fitted(name), everybody()
    model.save_pretrained(tmp_path)
    again = palate.load_model(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    if isinstance(again, palate.AttributePrior):
        again = again.with_attributes(TABLE)  # what is known of persons is never saved
    assert torch.equal(
        palate.margins(again, data, palate.adapt(again, data)), palate.margins(model, data, palate.adapt(model, data))
    )


# -- the same bits, and the same numbers in other types


@EVERY
def test_fit_leaves_its_argument_and_the_global_generator_alone(name: str) -> None:
    model = METHODS[name]()
    before = model.fingerprint()
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = palate.fit(pairs_of(COLUMNS), model, seed=3)
    assert again.fingerprint() == fitted(name).fingerprint()
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.fingerprint(), model.is_fitted) == (before, False)


def fingerprints() -> dict[str, str]:
    return {name: fitted(name).fingerprint() for name in METHODS}


def test_the_same_bits_in_another_process_with_another_hash_seed() -> None:
    code = f"""
import importlib.util, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("again", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name, fingerprint in module.fingerprints().items():
    print(name, fingerprint, sep="=")
"""
    source = str(Path(palate.__file__).resolve().parents[1])
    environment = {"PYTHONHASHSEED": "271828", "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.stderr == ""
    assert dict(line.split("=") for line in done.stdout.splitlines()) == fingerprints()


@EVERY
def test_half_precision_on_disk_gives_the_same_as_single_in_memory(name: str, tmp_path: Path) -> None:
    half = OTHERS["embeddings"].astype(np.float16)
    np.save(tmp_path / "e.npy", half)
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    reference, on_disk = pairs_of(OTHERS, embeddings=half.astype(np.float32)), pairs_of(OTHERS, embeddings=mapped)
    a, b = (palate.fit(data, METHODS[name]()) for data in (reference, on_disk))
    ours, theirs = palate.adapt(a, reference), palate.adapt(b, on_disk)
    atol = 0.05 if name == "lore-faithful" else 1e-4  # its 1,000 steps at .5 multiply the last bit (see test_from_scratch)
    torch.testing.assert_close(palate.margins(a, reference, ours), palate.margins(b, on_disk, theirs), atol=atol, rtol=1e-3)


@EVERY
def test_double_precision_gives_the_same_as_single(name: str) -> None:
    if name == "lore-faithful":
        pytest.skip("its 1,000 steps at .5 turn the last bit into the first digit (see test_from_scratch)")
    wide = pairs_of(COLUMNS, embeddings=COLUMNS["embeddings"].astype(np.float64))
    ours, theirs = (palate.margins(palate.fit(data, METHODS[name]()), data) for data in (pairs_of(COLUMNS), wide))
    torch.testing.assert_close(ours, theirs.float(), atol=5e-3, rtol=5e-3)


@EVERY
def test_a_model_reads_embeddings_of_another_precision(name: str) -> None:
    wide = pairs_of(COLUMNS, embeddings=COLUMNS["embeddings"].astype(np.float64))
    narrow = palate.adapt(fitted(name), pairs_of(COLUMNS))
    ours, theirs = (palate.margins(fitted(name), data, narrow) for data in (pairs_of(COLUMNS), wide))
    torch.testing.assert_close(ours, theirs.float(), atol=1e-3, rtol=1e-3)
    assert bool(torch.isfinite(palate.adapt(fitted(name), wide).mean).all())


def nothing_learned() -> dict[str, RewardModel]:
    zeros = torch.zeros
    return {
        "BradleyTerry": palate.BradleyTerry().like({"direction": zeros(5)}),
        "Reference": palate.Reference().like({"direction": zeros(5)}),
        "LoRe": palate.LoRe(2).like({"bases": zeros(5, 2), "mean_weights": torch.full((2,), 0.5)}),
        "PReF": palate.PReF().like({"direction": zeros(5), "bases": zeros(5, 0)}),
        "Hierarchical": palate.Hierarchical().like({"direction": zeros(5), "bases": zeros(5, 0)}),
        "MRM": palate.MRM(0).like({"direction": zeros(5), "bases": zeros(5, 0)}),
        "GivenBases": palate.GivenBases().like({"scale": zeros(5), "crowd": zeros(5)}),
        "PAL": palate.PAL().like({"direction": zeros(5), "entry": zeros(5, 0)}),
        "VPL": palate.VPL().like({"direction": zeros(5), "first": zeros(5, 0)}),
        "IndividualBT": palate.IndividualBT().like({"direction": zeros(5), "scale": zeros(5)}),
        "GroupBT": palate.GroupBT().like({"rewards": zeros(5, 1), "share": torch.ones(1)}),
        "Neighbours": palate.Neighbours().like({"rewards": zeros(5, 1), "nearest": torch.ones(()), "sharpness": torch.ones(())}),
        "AttributePrior": palate.AttributePrior().like({"direction": zeros(5), "bases": zeros(5, 0)}),
    }


@pytest.mark.parametrize("name", files.KINDS)
def test_a_model_that_predicts_nothing_has_half(name: str) -> None:
    model, data = nothing_learned()[name], everybody()
    assert not palate.margins(model, data).any()
    found = palate.evaluate(model, data, data)
    assert {row["accuracy"] for row in found.rows()} == {0.5}
    assert all(row["log_loss"] == pytest.approx(np.log(2)) for row in found.rows())


# -- against other programs


def differences(data: EmbeddedPairs) -> np.ndarray:
    return (data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)).double().numpy()


def test_bradley_terry_against_sklearn() -> None:
    """mean nll(z.mu) + ridge/2 |mu|^2 on scaled z is logistic regression without intercept at C = 1 / (ridge P)."""
    data, ridge = taken({**COLUMNS, "tie": np.zeros(len(COLUMNS["users"]), bool)}, np.arange(len(COLUMNS["users"]))), 0.02
    scale = crowd.standard_scale(data)[1].double().numpy()
    z = differences(data) * scale
    weight = data.weight.numpy() / data.weight.numpy().sum() * len(z)
    both = np.concatenate([z, -z])  # each choice from both sides, at half its weight
    labels, doubled = np.repeat([1, 0], len(z)), np.concatenate([weight, weight]) / 2
    oracle = LogisticRegression(C=1 / (ridge * len(z)), fit_intercept=False, tol=1e-10, max_iter=1000)
    expected = scale * oracle.fit(both, labels, sample_weight=doubled).coef_[0]
    model = palate.fit(data, palate.BradleyTerry(ridge=ridge))
    np.testing.assert_allclose(model.state_dict()["direction"], expected, atol=2e-4 * np.abs(expected).max())


def test_bradley_terry_on_items_is_the_ranking_by_strength() -> None:
    """One-hot items: the strengths maximise the penalised likelihood, found again by scipy from counts of wins."""
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 9, (4, 4)) * (1 - np.eye(4, dtype=int))
    chosen, rejected = (np.repeat(index.ravel(), wins.ravel()) for index in np.indices((4, 4)))
    data = EmbeddedPairs(OneHot(4), chosen, rejected, ["everybody"] * len(chosen))
    ridge = 1e-4
    strength = palate.fit(data, palate.BradleyTerry(ridge=ridge)).state_dict()["direction"].numpy()

    def objective(s: np.ndarray) -> float:
        gap = s[:, None] - s[None, :]
        return float((wins * np.logaddexp(0, -gap)).sum() / wins.sum() + ridge / 2 * s @ s)

    expected = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(strength - strength.mean(), expected - expected.mean(), atol=2e-3)


def ridge_direction(z: np.ndarray, tie: np.ndarray, share: np.ndarray, ridge: float) -> np.ndarray:
    """One direction by BFGS on the penalised likelihood, written again in numpy."""

    def objective(mu: np.ndarray) -> float:
        margin = z @ mu
        return float(share @ (np.logaddexp(0, -margin) + np.where(tie, margin / 2, 0)) + ridge / 2 * mu @ mu)

    return np.asarray(minimize(objective, np.zeros(z.shape[1]), method="BFGS", options={"gtol": 1e-8}).x)


@pytest.mark.parametrize("features", [12, 90])  # the whole space at once, and a growing subspace
@pytest.mark.parametrize("ties", [False, True])
def test_a_path_of_ridges_in_one_subspace_is_each_ridge_on_its_own(features: int, ties: bool) -> None:
    rng = np.random.default_rng(features)
    z = rng.normal(size=(150, features)) * np.geomspace(2, 0.05, features)
    tie = rng.random(150) < (0.2 if ties else 0.0)
    weight = rng.random(150) * (rng.random(150) < 0.8)  # a choice of weight 0 has no say but gets a margin
    design = crowd.Formed(torch.from_numpy(z))
    space = Subspace(design, torch.from_numpy(tie), torch.from_numpy(weight))
    for ridge in (0.3, 1e-2, 1e-4):
        found = space.solve(ridge, tolerance=1e-7)
        expected = ridge_direction(z, tie, weight / weight.sum(), ridge)
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))
        np.testing.assert_allclose(space.margins, z @ found.numpy(), atol=1e-8)
    back = space.solve(0.3, tolerance=1e-7)  # and from weak to strong
    np.testing.assert_allclose(back, ridge_direction(z, tie, weight / weight.sum(), 0.3), atol=2e-5)


def test_a_subspace_that_is_full_starts_again_where_it_stands() -> None:
    rng = np.random.default_rng(0)
    z, nobody = rng.normal(size=(400, 100)), np.zeros(400, dtype=bool)
    space = Subspace(crowd.Formed(torch.from_numpy(z)), torch.from_numpy(nobody), torch.ones(400, dtype=torch.float64), most=12)
    found = space.solve(1e-2, tolerance=1e-6)
    assert space.basis.shape[1] <= 12 < space.passes / 2
    np.testing.assert_allclose(found, ridge_direction(z, nobody, np.full(400, 1 / 400), 1e-2), atol=1e-4)


def test_a_subspace_stops_after_the_passes_it_was_given() -> None:
    z = np.random.default_rng(0).normal(size=(400, 300))
    space = Subspace(crowd.Formed(torch.from_numpy(z)), torch.zeros(400, dtype=torch.bool), torch.ones(400, dtype=torch.float64))
    space.solve(1e-6, tolerance=1e-9, steps=5)
    assert space.basis.shape[1] == 6  # the first gradient and five more


# -- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: palate.BradleyTerry(ridge=0.0), r"ridge is 0\.0; expected a positive number"),
        (lambda: palate.BradleyTerry(ridge=float("nan")), "ridge is nan"),
        (lambda: palate.LoRe(0), "n_bases is 0; expected a positive number of base rewards"),
        (lambda: palate.LoRe(()), r"n_bases is \(\)"),
        (lambda: palate.LoRe((2, -1)), r"n_bases is \(2, -1\)"),
        (lambda: palate.LoRe(2, steps=0), r"steps is 0 and rate 0\.1; expected at least one step"),
        (lambda: palate.LoRe(2, rate=0.0), r"rate 0\.0"),
        (lambda: palate.Hierarchical(-1), "n_bases is -1 and bend 1000; expected numbers of at least 0"),
        (lambda: palate.Hierarchical(bend=-2), "bend -2"),
        (lambda: palate.Hierarchical(kappa=-0.5), r"kappa is -0\.5; expected a finite number of at least 0"),
        (lambda: palate.Hierarchical(kappa=float("inf")), "kappa is inf; expected a finite number"),
        (lambda: palate.Hierarchical(prior_variance=0.0), r"prior_variance is 0\.0; expected a positive number"),
        (lambda: palate.BradleyTerry().like({"colour": torch.ones(2)}), r"has no number called 'colour'; it has \['direction'\]"),
    ],
)
def test_arguments_that_make_no_model(make: Callable[[], RewardModel], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_the_faithful_preset_takes_one_rank() -> None:
    with pytest.raises(DataError, match=r"n_bases is \(2, 3\); the faithful preset takes one number"):
        palate.fit(everybody(), palate.LoRe.faithful((2, 3)))  # type: ignore[arg-type]


def test_a_method_that_says_nothing_is_told_what_to_say() -> None:
    class Silent(RewardModel):
        """Says nothing."""

    silent, table = Silent(), everybody().embeddings
    for attempt, message in (
        (lambda: silent.n_features, "how many features it reads"),
        (lambda: silent.crowd_weights, "what the crowd's weights are"),
        (lambda: silent.options(), "how it was constructed"),
        (lambda: silent.features(table), "has no features"),
        (lambda: silent.design(torch.ones(1, 1)), "is not linear in its weights"),
    ):
        with pytest.raises(DataError, match=message):
            attempt()
    with pytest.raises(DataError, match="Newton needs a prior over the weights, and this model has none"):
        palate.models.base.Newton().solve(None, None, ())  # type: ignore[arg-type]


# -- what must not go wrong silently


@pytest.mark.parametrize("name", ["pref", "lore", "hierarchical", "mrm"])
def test_which_side_of_a_tie_came_first_says_nothing(name: str) -> None:
    rng = np.random.default_rng(0)
    n = 24 * 10
    tie = rng.random(n) < 0.4
    table, users = rng.standard_normal((2 * n, 5)), np.repeat([f"u{i:02d}" for i in range(24)], 10)
    sides = np.arange(n), n + np.arange(n)
    there = EmbeddedPairs(table, *sides, users, tie=tie)
    back = EmbeddedPairs(table, np.where(tie, sides[1], sides[0]), np.where(tie, sides[0], sides[1]), users, tie=tie)
    ours, theirs = palate.fit(there, METHODS[name]()), palate.fit(back, METHODS[name]())
    torch.testing.assert_close(palate.margins(ours, there), palate.margins(theirs, there), atol=1e-4, rtol=1e-4)


def test_a_method_that_diverged_is_no_model() -> None:
    data = pairs_of(COLUMNS, embeddings=COLUMNS["embeddings"] * 1e15)
    with pytest.raises(DataError, match="diverged"):
        palate.fit(data, palate.PReF.faithful(2))


@pytest.mark.parametrize("name", METHODS)
def test_users_of_one_choice_each_and_nobody_to_ask(name: str) -> None:
    rng = np.random.default_rng(0)
    users, prompts = [f"u{i:02d}" for i in range(20)], np.arange(20)
    data = EmbeddedPairs(rng.standard_normal((40, 5)), np.arange(20), 20 + np.arange(20), users, prompts=prompts)
    if name == "vpl-faithful":
        with pytest.raises(DataError, match="no two of one user"):  # its context is a user's other choices
            palate.fit(data, METHODS[name]())
        return
    model = palate.fit(data, METHODS[name]())
    assert bool(torch.isfinite(palate.margins(model, data, palate.adapt(model, data))).all())


@EVERY
def test_where_no_feature_differs_in_any_pair_every_margin_is_zero(name: str) -> None:
    columns = arrays(12, least=6)
    table = columns["embeddings"].copy()
    table[columns["rejected"]] = table[columns["chosen"]]  # texts differ, and the two sides of a choice never do
    data = pairs_of(columns, embeddings=table)
    model = palate.fit(data, METHODS[name]())
    assert not palate.margins(model, data).any()
    assert not palate.margins(model, data, palate.adapt(model, data)).any()


@EVERY
def test_profiles_of_nobody_are_the_crowd(name: str) -> None:
    model, data = fitted(name), everybody()
    nobody = palate.adapt(model, data[:0])
    torch.testing.assert_close(palate.margins(model, data, nobody), palate.margins(model, data))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(DataError, match="seed is -1"):
        palate.fit(pairs_of(COLUMNS), palate.BradleyTerry(), seed=-1)


def test_the_unit_of_the_features_does_not_matter() -> None:
    tiny = pairs_of(COLUMNS, embeddings=COLUMNS["embeddings"] * 1e-11)
    expected = palate.margins(fitted("bt"), pairs_of(COLUMNS))
    torch.testing.assert_close(palate.margins(palate.fit(tiny, METHODS["bt"](), seed=3), tiny), expected, atol=1e-3, rtol=1e-3)


def test_a_fingerprint_is_remembered_until_something_changes() -> None:
    model = palate.fit(pairs_of(COLUMNS), palate.BradleyTerry())
    first = model.fingerprint()
    assert model.fingerprint() == first == load_again(model).fingerprint()
    changes: list[Callable[[], object]] = [
        lambda: model.direction.mul_(2),
        lambda: setattr(model, "direction", model.direction.clone() + 1),
        lambda: setattr(model, "encoder", "another"),
        lambda: setattr(model, "ridge", 0.5),
    ]
    seen = {first}
    for change in changes:
        change()
        assert model.fingerprint() not in seen
        assert model.fingerprint() == load_again(model).fingerprint()
        seen.add(model.fingerprint())


def load_again(model: RewardModel) -> RewardModel:
    """Another object with the same numbers, which remembers nothing."""
    out = model.like({name: tensor.clone() for name, tensor in model.state_dict().items()})
    out.encoder = model.encoder
    return out
