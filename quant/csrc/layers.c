/* Layer after layer in one call: what segment.c does for the steps of a layer, for the layers of a token. Between two
 * layers an interpreter would come back to code and objects that their weights have driven out of the caches. */

#include "layer.h"
#include "part.h"

static struct expertd_choice choice_of(const struct expertd_layer *layer, const struct expertd_step *step,
                                       float *contributions, float *added) {
    return (struct expertd_choice){
        .experts = layer->experts,
        .n_experts = layer->n_experts,
        .n_tokens = step->n_tokens,
        .hidden_size = layer->segment->hidden_size,
        .top_k = layer->segment->top_k,
        .hidden_states = step->normed,
        .expert_ids = step->expert_ids,
        .weights = step->expert_weights,
        .contributions = contributions,
        .out = added,
    };
}

int expertd_compute_layers(struct expertd_workspace *workspace, const struct expertd_layer *layers, int64_t n_layers,
                           const struct expertd_step *step, float *contributions, float *added, int64_t *n_computed) {
    if (!is_aligned_to(8, layers) || !is_aligned_to(8, step) || !is_aligned_to(8, n_computed) || !is_aligned(added)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    struct expertd_step of_layer = *step;
    *n_computed = 0;
    for (const struct expertd_layer *layer = layers; layer < layers + n_layers; layer++, ++*n_computed) {
        int status = expertd_attention_segment(workspace, layer->segment, &of_layer);
        if (status == EXPERTD_OK) {
            struct expertd_choice choice = choice_of(layer, &of_layer, contributions, added);
            status = expertd_compute_experts(workspace, &choice, layer->segment->is_exact);
        }
        if (status != EXPERTD_OK) {
            return status;
        }
        of_layer.added = added;
    }
    return EXPERTD_OK;
}
