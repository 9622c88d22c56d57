/* All of a layer before its experts, one step after another. Each step is what layer.h and api.h say of it: called one by
 * one they compute the same bits, and cost an interpreter's way in and out each, which for a small model is as much as
 * the computation. */

#include "layer.h"
#include "part.h"

static int norm(struct expertd_workspace *workspace, const struct expertd_segment *segment,
                const struct expertd_step *step, const float *weight, const float *added) {
    return expertd_rms_norm(workspace, step->hidden_states, added, weight, segment->hidden_size, segment->eps,
                            step->normed, step->n_tokens * segment->hidden_size);
}

static struct expertd_product product_of(const struct expertd_part *part, float *y, int64_t n_tokens) {
    return (struct expertd_product){*part, y, n_tokens * part->rows};
}

static int project(struct expertd_workspace *workspace, const struct expertd_segment *segment,
                   const struct expertd_step *step) {
    const struct expertd_product products[] = {
        product_of(&segment->q_proj, step->queries, step->n_tokens),
        product_of(&segment->k_proj, step->keys, step->n_tokens),
        product_of(&segment->v_proj, step->values, step->n_tokens),
    };
    return expertd_multiply(workspace, products, 3, step->normed, step->n_tokens * segment->hidden_size, step->n_tokens,
                            segment->is_exact);
}

static int attend(struct expertd_workspace *workspace, const struct expertd_segment *segment,
                  const struct expertd_step *step) {
    for (int64_t i = 0; i < step->n_attentions; i++) {
        struct expertd_attention attention = *step->attentions[i];
        attention.layer = segment->layer;
        attention.queries = step->queries;
        attention.keys = step->keys;
        attention.values = step->values;
        attention.out = step->attended;
        int status = expertd_attend(workspace, &attention);
        if (status != EXPERTD_OK) {
            return status;
        }
    }
    return EXPERTD_OK;
}

static int multiply(struct expertd_workspace *workspace, const struct expertd_segment *segment,
                    const struct expertd_step *step, const struct expertd_part *part, const float *x, float *y) {
    struct expertd_product product = product_of(part, y, step->n_tokens);
    return expertd_multiply(workspace, &product, 1, x, step->n_tokens * part->cols, step->n_tokens, segment->is_exact);
}

static int choose(const struct expertd_segment *segment, const struct expertd_step *step) {
    return expertd_choose_experts(step->gate_logits, step->n_tokens, segment->gate.rows, segment->top_k,
                                  step->expert_ids, step->expert_weights);
}

static int check_segment(const struct expertd_segment *segment, const struct expertd_step *step) {
    if (segment == NULL || step == NULL || (step->n_attentions > 0 && !is_aligned_to(8, step->attentions))) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    static const int64_t most = 1 << 24; /* no product of two of these leaves 64 bits */
    const struct expertd_part *parts[] = {&segment->q_proj, &segment->k_proj, &segment->v_proj, &segment->o_proj,
                                          &segment->gate};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (parts[i]->rows < 1 || parts[i]->rows > most || parts[i]->cols < 1 || parts[i]->cols > most) {
            return EXPERTD_BAD_SHAPE;
        }
    }
    if (segment->hidden_size < 1 || segment->hidden_size > most || step->n_tokens < 0 || step->n_tokens > most) {
        return EXPERTD_BAD_LENGTH;
    }
    bool fits = segment->q_proj.cols == segment->hidden_size && segment->gate.cols == segment->hidden_size &&
                segment->o_proj.rows == segment->hidden_size && segment->o_proj.cols == segment->q_proj.rows;
    return fits ? EXPERTD_OK : EXPERTD_BAD_SHAPE;
}

int expertd_attention_segment(struct expertd_workspace *workspace, const struct expertd_segment *segment,
                              const struct expertd_step *step) {
    int status = check_segment(segment, step);
    if (status == EXPERTD_OK) {
        status = norm(workspace, segment, step, segment->input_norm, step->added);
    }
    if (status == EXPERTD_OK) {
        status = project(workspace, segment, step);
    }
    if (status == EXPERTD_OK) {
        status = attend(workspace, segment, step);
    }
    if (status == EXPERTD_OK) {
        status = multiply(workspace, segment, step, &segment->o_proj, step->attended, step->projected);
    }
    if (status == EXPERTD_OK) {
        status = norm(workspace, segment, step, segment->post_attention_norm, step->projected);
    }
    if (status == EXPERTD_OK) {
        status = multiply(workspace, segment, step, &segment->gate, step->normed, step->gate_logits);
    }
    return status == EXPERTD_OK ? choose(segment, step) : status;
}
