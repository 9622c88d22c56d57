/* What a later layer's gate says of states that are not its own yet: norm, product and choice in one call. */

#include "layer.h"
#include "part.h"

int expertd_foresee_experts(struct expertd_workspace *workspace, const struct expertd_foresight *foresight,
                            const float *hidden_states, int64_t n_tokens, int64_t *expert_ids) {
    static const int64_t most = 1 << 24; /* no product of two of these leaves 64 bits */
    if (foresight == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (n_tokens < 0 || n_tokens > foresight->n_tokens_max || foresight->hidden_size < 1 ||
        foresight->hidden_size > most || foresight->n_tokens_max > most) {
        return EXPERTD_BAD_LENGTH;
    }
    if (foresight->gate.cols != foresight->hidden_size || foresight->gate.rows < 1 || foresight->gate.rows > most) {
        return EXPERTD_BAD_SHAPE;
    }
    int64_t length = n_tokens * foresight->hidden_size;
    int status = expertd_rms_norm(workspace, (float *)hidden_states, NULL, foresight->norm, foresight->hidden_size,
                                  foresight->eps, foresight->normed, length);
    if (status != EXPERTD_OK) {
        return status;
    }
    struct expertd_product product = {foresight->gate, foresight->gate_logits, n_tokens * foresight->gate.rows};
    status = expertd_multiply(workspace, &product, 1, foresight->normed, length, n_tokens, foresight->is_exact);
    if (status != EXPERTD_OK) {
        return status;
    }
    return expertd_choose_experts(foresight->gate_logits, n_tokens, foresight->gate.rows, foresight->n_guessed,
                                  expert_ids, foresight->weights);
}
