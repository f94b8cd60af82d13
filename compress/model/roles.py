"""What a tensor is for. Roles carry policy: recipes address tensors by role, never by name."""

from enum import StrEnum


class Role(StrEnum):
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    NORM = "norm"
    ROUTER = "router"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    MOE_LATENT = "moe_latent"
    MLP = "mlp"
    ATTENTION_QKV = "attention_qkv"
    ATTENTION_OUT = "attention_out"
    SSM_IN = "ssm_in"
    SSM_X_PROJ = "ssm_x_proj"
    SSM_DT_PROJ = "ssm_dt_proj"
    SSM_OUT = "ssm_out"
    SSM_CONV = "ssm_conv"
    SSM_A = "ssm_a"
    SSM_D = "ssm_d"
    SSM_DT_BIAS = "ssm_dt_bias"
    STATE_SCALE = "state_scale"  # of a state that is kept in a number format with fixed scales
    MTP = "mtp"  # layers that guess further tokens: nothing here runs them, they travel as they came


# Roles that `quantize` leaves as they came, whatever the recipe; docs/roles.md argues each.
# All others take the recipe's `weights` format.
KEPT_BY_DEFAULT = frozenset(
    {Role.NORM, Role.ROUTER, Role.SSM_CONV, Role.SSM_A, Role.SSM_D, Role.SSM_DT_BIAS, Role.STATE_SCALE, Role.MTP}
)

# Roles whose tensors are matrices applied with a product (or looked up by row): the ones a number format fits.
QUANTIZABLE = frozenset(Role) - KEPT_BY_DEFAULT

# Roles whose inputs a recipe's `activations` applies to. The inputs of the scan's own matrices (its input, time step and
# output) are amplified by the recurrence, and what the experts' sum is projected by sees no norm: they are rounded only
# where `activation_roles` asks. An embedding has no input.
ACTIVATED_BY_DEFAULT = QUANTIZABLE - {
    Role.EMBEDDING, Role.SSM_X_PROJ, Role.SSM_DT_PROJ, Role.SSM_OUT, Role.MOE_LATENT,
}  # fmt: skip
