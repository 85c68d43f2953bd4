"""What the tests compare with: dense Hessians made in two ways that share no code, and models that are solved by hand.

`torch.func.hessian` is not used: with a LayerNorm it is silently wrong (torch 2.14), while double backward is not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float64).eps
# Step of a central difference that balances rounding, EPS / h, with truncation, h^2: both are then EPS^(2/3).
STEP = EPS ** (1 / 3)

Objective = Callable[[nn.Module], Tensor]


# Dense derivatives of an objective, a function from a float64 module to a scalar


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def dense_gradient(module: nn.Module, objective: Objective) -> Tensor:  # (n,)
    """First derivative by `backward()`, as training takes it."""
    module = copy.deepcopy(module)
    parameters = trainable(module)
    for parameter in parameters:
        parameter.grad = None
    objective(module).backward()
    return _flat([p.grad for p in parameters], parameters)


def dense_hessian(module: nn.Module, objective: Objective) -> Tensor:  # (n, n)
    """One row at a time by double backward, all of them from one graph."""
    module = copy.deepcopy(module)
    parameters = trainable(module)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = torch.autograd.grad(objective(module), parameters, create_graph=True, allow_unused=True)
    gradients = [None if g is None else g.to_dense() for g in gradients]
    rows = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        for i in range(parameter.numel()):
            if gradient is None or not gradient.requires_grad:
                rows.append(_flat([None] * len(parameters), parameters))
                continue
            entry = gradient.reshape(-1)[i]
            row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            rows.append(_flat(row, parameters))
    return torch.stack(rows)


def dense_hessian_by_differences(module: nn.Module, objective: Objective, step: float = STEP) -> Tensor:  # (n, n)
    """One row at a time by central differences of first derivatives: no second derivative of torch's is used."""
    module = copy.deepcopy(module)
    rows = []
    for parameter in trainable(module):
        values = parameter.data.view(-1)
        for i in range(parameter.numel()):
            centre = float(values[i])
            values[i] = centre + step
            plus = dense_gradient(module, objective)
            values[i] = centre - step
            minus = dense_gradient(module, objective)
            values[i] = centre
            rows.append((plus - minus) / (2 * step))
    return torch.stack(rows)


def top_eigenspace(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k algebraically largest eigenvalues, descending, and their eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:k], vectors.flip(1)[:, :k].T.contiguous()


def projected_share(basis: Tensor, vector: Tensor) -> float:
    """|P v|^2 / |v|^2 through the dense projector."""
    projection = basis.T @ (basis @ vector)
    return float(projection.dot(vector) / vector.dot(vector))


def mean_square_cosine(basis: Tensor, other: Tensor) -> float:
    """Tr(P P') / k through the dense projectors."""
    return float(torch.trace((basis.T @ basis) @ (other.T @ other))) / len(basis)


def _flat(tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pieces = [
        torch.zeros_like(p) if t is None else t.detach().to_dense() for t, p in zip(tensors, parameters, strict=True)
    ]
    return torch.cat([piece.reshape(-1) for piece in pieces])


# The solvable model


@dataclass(frozen=True)
class Prediction:
    """What must be measured at one point of the descent.

    Attributes:
        eigenvalues: all that are not zero by construction, descending, K (K - 1) of them.
        shares: f_k for k = 1 ... K (K - 1); only those at a gap of the spectrum are determined.
    """

    loss: float
    gradient_norm: float
    curvature: float  # g.Hg / |g|^2
    cosine: float  # g.Hg / (|g| |Hg|)
    eigenvalues: list[float]
    shares: list[float]

    def gaps(self) -> list[int]:
        """The k at which the eigenspace of the first k eigenvalues is determined, by a gap of 1 % of the largest."""
        floor = 0.01 * self.eigenvalues[0]
        return [k for k, gap in self._steps_down() if gap > floor]

    def inside_multiples(self) -> list[int]:
        """The k at which it is not determined, since the k-th eigenvalue is equal to the next."""
        rounding = 100 * EPS * self.eigenvalues[0]
        return [k for k, gap in self._steps_down() if gap < rounding]

    def _steps_down(self) -> list[tuple[int, float]]:
        behind = [*self.eigenvalues[1:], 0.0]
        return [(k, a - b) for k, (a, b) in enumerate(zip(self.eigenvalues, behind, strict=True), start=1)]


@dataclass(frozen=True)
class SolvableModel:
    """Softmax regression on orthonormal class means (Gur-Ari, Roberts and Dyer 2018, section 3), in closed form.

    All examples of class c lie on mu_c, with mu_c . mu_c' = delta_cc'. Class c has the share pi_c of the examples. The
    logits are z = Theta x (+ b), Theta and b start at zero, descent is by the full gradient with step eta. The paper
    takes K = 2, equal shares and gradient flow; the following holds for any K and for every single step.

    *Without biases.* On mu_c, symmetry leaves one number: a_c, the right logit minus any wrong one. The right class has
    the probability p = e^a / (e^a + K - 1), each wrong one q = 1 / (e^a + K - 1), so that 1 - p = (K - 1) q and
    1 - p + q = K q. With u_c = K e_c - 1 (the all-one vector subtracted), |u_c|^2 = K (K - 1), the gradient is
    -sum_c pi_c q_c u_c (x) mu_c, and one step gives

        a_c <- a_c + eta K pi_c q_c.

    The Hessian is sum_c pi_c A_c (x) mu_c mu_c^T with A_c = diag(p) - p p^T over the outputs. A_c u_c = K p q u_c as
    p . u_c = (K - 1)(p - q); on vectors orthogonal to u_c and to 1 it is q; A_c 1 = 0. Hence the eigenvalues

        K pi_c p_c q_c   once for each c, with the gradient along them in proportions (pi_c q_c)^2,
        pi_c q_c         K - 2 times for each c,

    and zero. With equal shares pi = 1/K this is p q, K times, and q / K, K (K - 2) times; g is an eigenvector:
    f_K = 1 and g.Hg / |g|^2 = p q.

    *With biases and equal shares* each mu_c gets a coordinate 1. The gradient by b, a sum of all u_c, vanishes: a, the
    loss and the gradient are those without biases, and p q is still the eigenvalue of g. Write w_c for column c of a
    direction and beta for its bias; then H gives A_c (w_c + beta) / K in column c, and their sum in the bias. Take
    w_c = x P_c beta + y (1 - P_c) beta and z beta for the bias, with P_c the projector on u_c, beta . 1 = 0, and
    sum_c P_c beta = K / (K - 1) beta: H acts on (x, y, z) as

        [ p q                0              p q                      ]
        [ 0                  q/K            q/K                      ]
        [ K p q / (K - 1)    q (K-2)/(K-1)  q (K p + K - 2) / (K - 1)]

    whose eigenvalues are 0 and the roots of s^2 - T s + D with T the trace, D = p q^2 (K + 1) / K the sum of the
    principal 2 x 2 minors, each K - 1 times. What does not couple to the biases keeps its eigenvalue: p q once, q / K
    K^2 - 3 K + 1 times. For K = 2 there is no y, and the roots are 3 p q and 0. So g lies *below* K - 1 larger
    eigenvalues: f_{K-1} = 0 and f_K = 1.
    """

    num_classes: int
    learning_rate: float
    shares: tuple[float, ...] | None = None  # pi_c; None for equal ones
    bias: bool = False

    @property
    def class_shares(self) -> tuple[float, ...]:
        """pi_c."""
        return self.shares or (1.0 / self.num_classes,) * self.num_classes

    def margins(self, step: int) -> list[float]:
        """a_c after `step` steps."""
        margins = []
        for share in self.class_shares:
            a = 0.0
            for _ in range(step):
                a += self.learning_rate * self.num_classes * share / (math.exp(a) + self.num_classes - 1)
            margins.append(a)
        return margins

    def prediction(self, step: int) -> Prediction:
        """Everything that is measured after `step` steps."""
        k, shares, margins = self.num_classes, self.class_shares, self.margins(step)
        q = [1.0 / (math.exp(a) + k - 1) for a in margins]
        p = [1.0 - (k - 1) * value for value in q]
        loss = -sum(share * math.log(value) for share, value in zip(shares, p, strict=True))
        squares = [(share * value) ** 2 * k * (k - 1) for share, value in zip(shares, q, strict=True)]  # of g, by class
        along = [k * share * a * b for share, a, b in zip(shares, p, q, strict=True)]  # their eigenvalues
        square = sum(squares)
        first = sum(s * value for s, value in zip(squares, along, strict=True))  # g.Hg
        second = sum(s * value**2 for s, value in zip(squares, along, strict=True))  # |Hg|^2
        pairs = self._pairs(p, q, squares, along)
        running, fractions = 0.0, []
        for _, part in pairs:
            running += part / square
            fractions.append(running)
        return Prediction(
            loss=loss,
            gradient_norm=math.sqrt(square),
            curvature=first / square,
            cosine=first / math.sqrt(square * second),
            eigenvalues=[value for value, _ in pairs],
            shares=fractions,
        )

    def _pairs(
        self, p: list[float], q: list[float], squares: list[float], along: list[float]
    ) -> list[tuple[float, float]]:
        """(eigenvalue, square of the gradient's component along it), by falling eigenvalue."""
        k = self.num_classes
        if not self.bias:
            bulk = [share * value for share, value in zip(self.class_shares, q, strict=True) for _ in range(k - 2)]
            pairs = [*zip(along, squares, strict=True), *((value, 0.0) for value in bulk)]
        elif k == 2:
            pairs = [(3 * along[0], 0.0), (along[0], sum(squares))]
        else:
            a, b = p[0], q[0]
            trace = a * b + b / k + b * (k * a + k - 2) / (k - 1)
            root = math.sqrt(trace**2 / 4 - a * b**2 * (k + 1) / k)
            outer = [trace / 2 + root, trace / 2 - root] * (k - 1)
            pairs = [(along[0], sum(squares)), *((v, 0.0) for v in outer + [b / k] * (k * k - 3 * k + 1))]
        return sorted(pairs, reverse=True)


@dataclass(frozen=True)
class Quadratic:
    """Linear regression under gradient descent: the negative control, in closed form.

    L = |X theta - y|^2 / (2 N) has the constant Hessian X^T X / N with eigenvalues lambda_i, so that the components of
    the gradient obey c_i(t) = (1 - eta lambda_i)^t c_i(0) and

        f_k(t) = sum_{i <= k} (1 - eta lambda_i)^(2t) c_i(0)^2 / sum_i (1 - eta lambda_i)^(2t) c_i(0)^2.

    Below the edge, eta lambda_1 < 1, the large eigenvalues are learnt first and f_k falls to zero.
    """

    eigenvalues: Tensor  # (n,) descending
    components: Tensor  # (n,) c_i(0)
    learning_rate: float

    def share(self, k: int, step: int) -> float:
        squares = (1.0 - self.learning_rate * self.eigenvalues) ** (2 * step) * self.components.square()
        return float(squares[:k].sum() / squares.sum())
