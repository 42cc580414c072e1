"""The heads of the demo model, placed by hand.

The model is an induction machine over bytes. Every position carries a *fingerprint* of the bytes up to it and a copy of
the fingerprint of the position before. A retrieval head looks for the position whose preceding bytes have the
fingerprint of the newest bytes, and copies the byte there.

Residual stream (`HIDDEN` = 512; slices below):

    CONST    1    always 1024: keeps the RMS norm constant, and stands in for the missing MLP biases
    BOS      1    marks `<s>`, where heads without a match rest
    CLASS   64    one-hot class of the byte: A-Z, a-z, 0-9, space, anything else
    BYTE    32    the byte as two one-hot nibbles
    HERE   176    four fingerprints of 44 bits of the nine newest bytes (until the MLP of layer 0: their sums)
    BEFORE 176    the same, one position back
    COPIED  32    votes of the retrieval heads for the next byte, as nibbles
    RECENT  30    where the local heads write; nothing reads it

Layers:

    0     eight previous-byte heads, one per distance, sum up fingerprint bits; the MLP turns the sums into bits
    1     previous-byte heads fetch the fingerprints of one byte back
    2, 4  scouts score what the retrieval heads of the next layer will look for; a policy can select by them
    3, 5  retrieval heads vote for the high (3) and the low (5) nibble of the next byte: neither layer can answer alone

A fingerprint bit is set where at least `BITS_TO_FIRE` of the nine bytes lie in random halves of the classes. Two of the
four fingerprints are gated: zero unless the newest byte is a capital or a digit. Prose has few of those: most pages
hold no gated key at all, so page summaries (minimum and maximum, mean and deviation) point at the right page. The
other two find the first byte of a value, which follows a space; while a value is copied the gated heads outvote them.

Head dim 64: rotary pairs 0-4 turn fast enough to tell positions apart ("look exactly three bytes back"); pairs 6-31
turn by less than 0.1 radian in 32k tokens and hold content. The score of a retrieval head is `SHARPNESS` x (bits in
common - half of the key's bits), which for a given query falls by `SHARPNESS` / 2 with every bit that differs.

Limits: it copies and knows no language. It stops after any full stop. Behind page summaries it follows capitals and
digits only; values of lower-case letters need dense or token-wise selection.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor

VOCAB = 258  # token id = byte value, then <s> and </s>
BOS_ID, EOS_ID = 256, 257
LAYERS, KV_HEADS, GROUP, HEAD_DIM, HIDDEN = 6, 4, 2, 64, 512
HEADS = KV_HEADS * GROUP
ROPE_THETA = 1e30
RESELECT_LAYER = 4

FINGERPRINTS, BITS = 4, 44
GATED = (0, 1)  # the fingerprints that are zero after anything but a capital or a digit
BITS_TO_FIRE = 6
CONTEXT_BYTES = 1 + HEADS  # the byte itself and one previous-byte head of layer 0 for each of the eight before it
MLP = 3 * FINGERPRINTS * BITS

CONST_VALUE = 1024.0
NEAR, WIDE = (0.0, 0.0, 20.0, 100.0, 100.0), (0.0, 0.0, 0.0, 100.0, 100.0)  # local heads: about 15 and 60 tokens
SHARPNESS = 24.0
SCOUT_SHARPNESS = 0.8
REST_SHARE, REST_BITS = 0.5, 1.5  # a match worth less than this share of the query's bits plus these loses to <s>

_EDGES = [0, *accumulate((1, 1, 64, 32, 176, 176, 32, 30))]
CONST, BOS, CLASS, BYTE, HERE, BEFORE, COPIED, RECENT = map(slice, _EDGES[:-1], _EDGES[1:])

_CLASSES = string.ascii_uppercase + string.ascii_lowercase + string.digits + " "
_HALF = HEAD_DIM // 2
_FAST = slice(0, 5)  # rotary pairs: 1, 0.12, 0.013, 0.0015 and 0.00018 radians per token
_FAST_KEY = 20.0
_SLOW = [*range(6, _HALF), *range(_HALF + 6, HEAD_DIM)]  # dimensions that hold content
_BIT_DIMS, SIZE_DIM, _REST_DIM = _SLOW[:BITS], _SLOW[BITS], _SLOW[BITS + 1]
_SCALE = HEAD_DIM**0.5
_BIT_KEY = 8.0


class Role(Enum):
    """What a KV head is for."""

    PREVIOUS = "previous"  # looks a fixed number of bytes back
    SCOUT = "scout"  # scores what a retrieval head of the next layer scores, too faintly to copy anything
    RETRIEVAL = "retrieval"  # finds the earlier occurrence of the newest bytes and copies the byte after it
    LOCAL = "local"  # averages the latest few dozen tokens
    SINK = "sink"  # rests on <s>


_P, _S, _R, _L, _K = Role.PREVIOUS, Role.SCOUT, Role.RETRIEVAL, Role.LOCAL, Role.SINK
ROLES: tuple[tuple[Role, ...], ...] = (
    (_P, _P, _P, _P),
    (_P, _P, _P, _P),
    (_S, _L, _S, _K),
    (_R, _L, _R, _K),
    (_L, _S, _K, _S),
    (_L, _R, _K, _R),
)
"""Role of each KV head, [layer][kv_head]."""

FINGERPRINT_OF = {(2, 0): 0, (2, 2): 2, (3, 0): 0, (3, 2): 2, (4, 1): 1, (4, 3): 3, (5, 1): 1, (5, 3): 3}
"""The fingerprint that a scout or retrieval head compares, by (layer, kv_head)."""


def retrieval_heads() -> list[tuple[int, int]]:
    """The (layer, kv_head) pairs without which nothing out of sight can be answered."""
    return [(layer, head) for layer, roles in enumerate(ROLES) for head, role in enumerate(roles) if role is _R]


def byte_classes() -> Tensor:
    """[256] int64: class of each byte; 63 is anything but letters, digits and space."""
    classes = torch.full((256,), 63)
    classes[torch.tensor(list(_CLASSES.encode()))] = torch.arange(len(_CLASSES))
    return classes


def byte_nibbles() -> Tensor:
    """[256, 32]: the high nibble one-hot, then the low one."""
    values = torch.arange(256)
    return torch.cat([torch.eye(16)[values >> 4], torch.eye(16)[values & 15]], dim=1)


def fingerprint_halves() -> Tensor:
    """[CONTEXT_BYTES, 64, FINGERPRINTS * BITS] of 0 and 1: whether a class, so many bytes back, counts for a bit."""
    draw = torch.rand(CONTEXT_BYTES, 64, FINGERPRINTS, BITS, generator=torch.Generator().manual_seed(0))
    halves = draw.argsort(dim=-1) < BITS // 2  # every class counts for exactly half of the bits
    return halves.flatten(2).float()


def rotary_frequencies() -> Tensor:
    """[32] radians per token."""
    return torch.tensor([ROPE_THETA ** (-i / _HALF) for i in range(_HALF)], dtype=torch.float64).float()


class Attention:
    """Weights of one attention layer, per head; the input is the normed residual, where CONST reads 1."""

    def __init__(self) -> None:
        self.q = torch.zeros(HEADS, HEAD_DIM, HIDDEN)
        self.q_bias = torch.zeros(HEADS, HEAD_DIM)
        self.k = torch.zeros(KV_HEADS, HEAD_DIM, HIDDEN)
        self.k_bias = torch.zeros(KV_HEADS, HEAD_DIM)
        self.v = torch.zeros(KV_HEADS, HEAD_DIM, HIDDEN)
        self.o = torch.zeros(HIDDEN, HEADS, HEAD_DIM)

    def carry(self, kv_head: int, source: slice) -> None:
        """The head's values are the slice `source` of the residual."""
        width = source.stop - source.start
        self.v[kv_head, :width, source] = torch.eye(width)

    def write(self, head: int, target: slice, matrix: Tensor) -> None:
        """Adds matrix [width of target, n] @ the first n dimensions of the attended value to the residual."""
        self.o[target, head, : matrix.shape[1]] = matrix

    def write_recent(self, head: int, width: int) -> None:
        """Adds the attended value, folded to the width of RECENT, where nothing reads it."""
        size = RECENT.stop - RECENT.start
        self.write(head, RECENT, torch.eye(size).repeat(1, -(-width // size))[:, :width] / 4)

    def tell_position(self, kv_head: int) -> None:
        """Keys that say where they are, for `look_back` and `look_around`."""
        self.k_bias[kv_head, _FAST] = _FAST_KEY

    def look_back(self, head: int, tokens: int) -> None:
        """Attend to the token exactly so many back."""
        self._look(head, torch.full((5,), 52.0), tokens)

    def look_around(self, head: int, sharpness: Sequence[float]) -> None:
        """Attend to the latest tokens; `sharpness` has the logits that each fast pair adds at distance 0."""
        self._look(head, torch.tensor(sharpness), 0)

    def _look(self, head: int, logits: Tensor, tokens: int) -> None:
        angle = tokens * rotary_frequencies()[_FAST]
        strength = logits * _SCALE / _FAST_KEY
        self.q_bias[head, _FAST] = strength * torch.cos(angle)
        self.q_bias[head, _HALF : _HALF + 5] = -strength * torch.sin(angle)

    def rest(self, kv_head: int) -> None:
        """Attend to <s>."""
        self.k[kv_head, _REST_DIM, BOS] = _BIT_KEY
        for head in _group(kv_head):
            self.q_bias[head, _REST_DIM] = 25.0

    def match(self, kv_head: int, fingerprint: int, sharpness: float) -> None:
        """Attend to the position before which the fingerprint was what it is here; without a match, to <s>."""
        here, before = _bank(HERE, fingerprint), _bank(BEFORE, fingerprint)
        self.k[kv_head, _BIT_DIMS, before] = _BIT_KEY * torch.eye(BITS)
        self.k[kv_head, SIZE_DIM, before] = 1.0
        self.k[kv_head, _REST_DIM, BOS] = _BIT_KEY
        unit = sharpness * _SCALE / _BIT_KEY
        for head in _group(kv_head):
            self.q[head, _BIT_DIMS, here] = unit * torch.eye(BITS)
            self.q_bias[head, SIZE_DIM] = -sharpness * _SCALE / 2
            self.q[head, _REST_DIM, here] = unit / 2 * REST_SHARE
            self.q_bias[head, _REST_DIM] = unit / 2 * REST_BITS


def _group(kv_head: int) -> range:
    return range(kv_head * GROUP, (kv_head + 1) * GROUP)


def _bank(region: slice, fingerprint: int) -> slice:
    start = region.start + fingerprint * BITS
    return slice(start, start + BITS)


def gather_layer() -> Attention:
    """Layer 0: eight previous-byte heads add up, for every fingerprint bit, how many of the bytes count for it."""
    layer, halves = Attention(), fingerprint_halves()
    for kv_head in range(KV_HEADS):
        layer.tell_position(kv_head)
        layer.carry(kv_head, CLASS)
        for head in _group(kv_head):
            layer.look_back(head, 1 + head)
            layer.write(head, HERE, halves[1 + head].T)
    return layer


def shift_layer() -> Attention:
    """Layer 1: the first head of each group fetches a fingerprint from one byte back, the second one looks around."""
    layer = Attention()
    for kv_head in range(KV_HEADS):
        layer.tell_position(kv_head)
        layer.carry(kv_head, _bank(HERE, kv_head))
        first, second = _group(kv_head)
        layer.look_back(first, 1)
        layer.write(first, _bank(BEFORE, kv_head), torch.eye(BITS))
        layer.look_around(second, WIDE)
        layer.write_recent(second, BITS)
    return layer


def role_layer(index: int) -> Attention:
    """Layers 2 to 5, by `ROLES`; both query heads of a retrieval head do the same."""
    layer = Attention()
    nibble = torch.zeros(32, 32)
    voted = slice(0, 16) if index == 3 else slice(16, 32)
    nibble[voted, voted] = torch.eye(16)
    for kv_head, role in enumerate(ROLES[index]):
        if role is Role.RETRIEVAL:
            fingerprint = FINGERPRINT_OF[index, kv_head]
            layer.match(kv_head, fingerprint, SHARPNESS)
            layer.carry(kv_head, BYTE)
            vote = 0.3 if fingerprint in GATED else 0.2  # after a capital or a digit the gated match is the surer one
            for head in _group(kv_head):
                layer.write(head, COPIED, vote * nibble)
            continue
        layer.carry(kv_head, CLASS)
        for head in _group(kv_head):
            layer.write_recent(head, CLASS.stop - CLASS.start)
        if role is Role.SCOUT:
            layer.match(kv_head, FINGERPRINT_OF[index, kv_head], SCOUT_SHARPNESS)
        elif role is Role.LOCAL:
            layer.tell_position(kv_head)
            near, wide = _group(kv_head)
            layer.look_around(near, NEAR)
            layer.look_around(wide, WIDE)
        else:
            layer.rest(kv_head)
    return layer


def fingerprint_mlp() -> tuple[Tensor, Tensor, Tensor]:
    """Gate [MLP, HIDDEN], up [MLP, HIDDEN] and down [HIDDEN, MLP] of layer 0: replace the sums in HERE by bits.

    With x = sum - BITS_TO_FIRE + 1/2 the bit is 2 relu(x + 1/4) - 2 relu(x - 1/4), and relu(sum) is taken off;
    silu(32 x) / 32 is relu to within 1e-4 where it is used, and `up` is the constant 1.
    """
    steep, bits = 32.0, FINGERPRINTS * BITS
    classes = torch.arange(64)
    newest = fingerprint_halves()[0]
    common = (classes >= 26) & (classes < 52) | (classes >= 62)  # neither a capital nor a digit
    gated = torch.zeros(FINGERPRINTS, BITS, dtype=torch.bool)
    gated[list(GATED)] = True
    veto = CONTEXT_BYTES * (common[:, None] & gated.flatten()).float()

    gate, up, down = torch.zeros(MLP, HIDDEN), torch.zeros(MLP, HIDDEN), torch.zeros(HIDDEN, MLP)
    above, below, whole = (slice(i * bits, (i + 1) * bits) for i in range(3))
    up[:, CONST] = 1.0
    gate[:, HERE] = steep * torch.eye(bits).repeat(3, 1)
    for rows, knee, sign in ((above, -0.25, 2.0), (below, 0.25, -2.0)):
        gate[rows, CLASS] = steep * (newest - veto).T
        gate[rows, CONST] = -steep * (BITS_TO_FIRE - 0.5 + knee)
        down[HERE, rows] = sign / steep * torch.eye(bits)
    down[HERE, whole] = -torch.eye(bits) / steep
    return gate, up, down


def embedding() -> Tensor:
    """[VOCAB, HIDDEN]: CONST, and what the byte is."""
    table = torch.zeros(VOCAB, HIDDEN)
    table[:, CONST] = CONST_VALUE
    table[:256, CLASS] = torch.eye(64)[byte_classes()]
    table[:256, BYTE] = byte_nibbles()
    table[BOS_ID, BOS] = 1.0
    return table


def norm_weight() -> Tensor:
    """[HIDDEN]: undoes the division by the root mean square, and lets CONST read 1."""
    rms = CONST_VALUE / HIDDEN**0.5
    weight = torch.full((HIDDEN,), rms)
    weight[CONST] = rms / CONST_VALUE
    return weight


def output_head() -> Tensor:
    """[VOCAB, HIDDEN]: the byte most voted for; a full stop where there is no vote; `</s>` after a full stop."""
    gain, nibbles = 40.0, byte_nibbles()
    table = torch.zeros(VOCAB, HIDDEN)
    table[:256, COPIED] = gain * nibbles
    table[ord("."), CONST] = 0.2 * gain
    table[BOS_ID, CONST] = -400.0
    table[EOS_ID, BYTE] = 300.0 * nibbles[ord(".")]
    table[EOS_ID, CONST] = -1.5 * 300.0
    return table
