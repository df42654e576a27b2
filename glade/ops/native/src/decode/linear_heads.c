/* The instruction LINEAR_HEADS: convolutions, gates, recurrence, output norm and gate of the value heads of one key head.
 *
 * A task owns its rows of the state, so nothing is shared: the tasks of one instruction may run in any order. */
#include "../linear_attention/kernel.h"
#include "kernel.h"
#include "matmul.h"

typedef struct {
    float *q, *k, *g, *erase; /* [K] */
    float *v, *write, *o;     /* [V] */
    float *inner;             /* SiLU between the two factors of a gate */
    float *step;              /* working memory of the recurrence */
} Head;

static Step step_of(const LinearHeads *op) {
    return (Step){.num_rows = 1, .num_heads = 1, .num_value_heads = 1, .key_dim = op->key_dim,
                  .value_dim = op->value_dim, .scale = op->scale};
}

static size_t carve(Head *x, float *memory, const LinearHeads *op) {
    float *start = memory;
    float **k_like[] = {&x->q, &x->k, &x->g, &x->erase}, **v_like[] = {&x->v, &x->write, &x->o};
    for (size_t i = 0; i < sizeof k_like / sizeof *k_like; i++) *k_like[i] = cut(&memory, op->key_dim);
    for (size_t i = 0; i < sizeof v_like / sizeof *v_like; i++) *v_like[i] = cut(&memory, op->value_dim);
    x->inner = cut(&memory, op->decay_input.matrix.columns);
    x->step = memory;
    return memory - start;
}

size_t NAME(linear_heads_floats)(const LinearHeads *op) {
    Head x;
    Step step = step_of(op);
    float none[1];
    return carve(&x, none, op) + NAME(step_floats)(&step);
}

INLINE void put_at(char *data, long at, float x, long dtype) {
    if (dtype == FLOAT32) memcpy(data + at * 4, &x, 4);
    else {
        uint16_t half = bfloat16_of(x);
        memcpy(data + at * 2, &half, 2);
    }
}

/* y = convolution of n channels; the past [n, taps - 1] is moved on by the new input */
INLINE void convolve_as(float *restrict y, const float *restrict x, const char *restrict weight, char *restrict past,
                        long n, long taps, long weight_dtype, long past_dtype) {
    const long kept = taps - 1;
    for (long c = 0; c < n; c++) {
        float sum = weight_at(weight, c * taps + kept, weight_dtype) * x[c];
        for (long j = 0; j < kept; j++) {
            float before = weight_at(past, c * kept + j, past_dtype);
            sum += weight_at(weight, c * taps + j, weight_dtype) * before;
            if (j) put_at(past, c * kept + j - 1, before, past_dtype);
        }
        if (kept) put_at(past, c * kept + kept - 1, x[c], past_dtype);
        y[c] = sum;
    }
}

/* channels first .. first + n of a projection */
static void convolve(float *y, const float *x, long first, long n, const Vector *weight, const StateTensor *state,
                     long row, long taps) {
    const char *w = weight->data + first * taps * size_of(weight->dtype);
    char *past = state->data + (row * state->row + first * (taps - 1)) * size_of(state->dtype);
    if (weight->dtype == FLOAT32 && state->dtype == FLOAT32) {
        if (taps == 4) convolve_as(y, x, w, past, n, 4, FLOAT32, FLOAT32);
        else convolve_as(y, x, w, past, n, taps, FLOAT32, FLOAT32);
    } else if (weight->dtype == BFLOAT16 && state->dtype == BFLOAT16) {
        if (taps == 4) convolve_as(y, x, w, past, n, 4, BFLOAT16, BFLOAT16);
        else convolve_as(y, x, w, past, n, taps, BFLOAT16, BFLOAT16);
    } else convolve_as(y, x, w, past, n, taps, weight->dtype, state->dtype);
}

/* n channels of q, k or v of a head: convolution and activation */
static void channels(float *y, const Run *run, const LinearHeads *op, long row, long from, long first, long n,
                     const Vector *weight, long past) {
    const float *x = place(run, row, from + first);
    if (op->taps) convolve(y, x, first, n, weight, &run->states[past], state_row(run, row), op->taps);
    else memcpy(y, x, n * sizeof(float));
    if (op->silu)
        for (long at = 0; at < n; at += LANES) store_row(y, at, n, silu_vec(row_at(y, at, n)));
}

static float sum_of_squares(const float *x, long n) {
    vec sum = splat(0.0f);
    for (long at = 0; at < n; at += LANES) {
        vec part = row_at(x, at, n);
        sum += part * part;
    }
    return sum_lanes(sum);
}

/* what is particular to q and k: feature map, unit norm */
static void map_features(float *x, const LinearHeads *op) {
    long n = op->key_dim;
    if (op->feature_map != IDENTITY)
        for (long at = 0; at < n; at += LANES) {
            vec y = row_at(x, at, n), positive = select_vec(y > 0.0f, y, splat(0.0f));
            if (op->feature_map == ELU1) y = select_vec(y > 0.0f, y + 1.0f, exp_vec(select_vec(y > 0.0f, splat(0.0f), y)));
            store_row(x, at, n, op->feature_map == RELU ? positive : y);
        }
    if (op->unit) {
        float factor = 1.0f / sqrtf(sum_of_squares(x, n) + 1e-6f);
        for (long i = 0; i < n; i++) x[i] *= factor;
    }
}

/* numbers first .. first + n of a gate's input */
static void project(float *y, float *inner, const Run *run, const Projected *p, long row, long first, long n) {
    const float *x = place(run, row, p->input);
    const Matrix *m = &p->matrix;
    if (!m->rows) {
        memcpy(y, x + first, n * sizeof(float));
        return;
    }
    if (p->silu) {
        for (long at = 0; at < m->columns; at += LANES) store_row(inner, at, m->columns, silu_vec(row_at(x, at, m->columns)));
        x = inner;
    }
    long pitch = m->columns * size_of(m->dtype);
    for (long i = 0; i < n; i += LANES) {
        const char *weights = m->data + (first + i) * pitch, *ahead = weights + LANES * pitch;
        vec sums;
        if (i + LANES <= n) {
            if (m->dtype == FLOAT32) sums = tile_sums(weights, ahead, &x, m->columns, FLOAT32, LANES, 1);
            else if (m->dtype == BFLOAT16) sums = tile_sums(weights, ahead, &x, m->columns, BFLOAT16, LANES, 1);
            else sums = tile_sums(weights, ahead, &x, m->columns, INT8, LANES, 1);
        } else {
            float part[LANES] = {0};
            for (long r = 0; r < n - i; r++) {
                const char *row = weights + r * pitch;
                part[r] = tile_sums(row, row + pitch, &x, m->columns, m->dtype, 1, 1)[0];
            }
            sums = load(part);
        }
        Vector scales = {(const char *)m->scales, FLOAT32};
        if (m->dtype == INT8) sums *= vector_at(&scales, first + i, first + n);
        if (m->bias.data) sums += vector_at(&m->bias, first + i, first + n);
        store_row(y, i, n, sums);
    }
}

/* the log decay of value head `head` in x->g: 1 number or K. Returns how many, 0 for none. */
static long decay(Head *x, const Run *run, const LinearHeads *op, long row, long head) {
    if (op->decay == NO_DECAY) return 0;
    long own = op->decay_heads == op->num_value_heads ? head : head / (op->num_value_heads / op->num_heads);
    if (op->decay == TABLE_DECAY) {
        x->g[0] = weight_at(op->a_log.data, head, op->a_log.dtype);
        return 1;
    }
    long n = op->decay_channels, first = own * n;
    float constant = (float)op->decay_constant;
    project(x->g, x->inner, run, &op->decay_input, row, first, n);
    vec rate = splat(0.0f);
    if (op->a_log.data) rate = exp_vec(splat(weight_at(op->a_log.data, own, op->a_log.dtype)));
    for (long at = 0; at < n; at += LANES) {
        vec z = row_at(x->g, at, n);
        if (op->dt_bias.data) z += vector_at(&op->dt_bias, first + at, first + n);
        switch (op->decay) {
        case LOGSIGMOID_DECAY: z = -softplus_vec(-z) / constant; break;
        case TEMPERED_DECAY: z = -softplus_vec(-z / constant); break;
        case SOFTPLUS_DECAY: z = -rate * softplus_vec(z); break;
        default: z = constant * sigmoid_vec(rate * z);
        }
        store_row(x->g, at, n, z);
    }
    return n;
}

INLINE float sigmoid_of(float x) { return sigmoid_vec(splat(x))[0]; }

static float clamped(float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; }

/* a gate per channel: sigmoid(x) * step, clipped if asked, times `factor` */
static void channel_gate(float *y, const float *x, long n, const LinearHeads *op, float step, float factor) {
    for (long at = 0; at < n; at += LANES) {
        vec gate = sigmoid_vec(row_at(x, at, n)) * step;
        store_row(y, at, n, factor * (op->clip ? clamp_vec(gate) : gate));
    }
}

/* erase and write in x: 1 number or as many as channels. Returns whether there are any, and their widths. */
static int erase_and_write(Head *x, const Run *run, const LinearHeads *op, long row, long head, float energy,
                           long *erase_width, long *write_width) {
    float step = 1.0f, factor = op->doubled ? 2.0f : 1.0f;
    if (op->kaczmarz) {
        float eps = (float)op->kaczmarz_eps;
        energy = op->kaczmarz == ADD_EPS ? energy + eps : energy < eps ? eps : energy;
        step = sigmoid_of(*place(run, row, op->eta + head)) / energy;
    }
    if (op->erase >= 0) {
        long key_head = head / (op->num_value_heads / op->num_heads);
        channel_gate(x->erase, place(run, row, op->erase + key_head * op->key_dim), op->key_dim, op, step, factor);
        channel_gate(x->write, place(run, row, op->write + head * op->value_dim), op->value_dim, op, step, 1.0f);
        *erase_width = op->key_dim, *write_width = op->value_dim;
        return 1;
    }
    if (op->beta < 0 && !op->kaczmarz) return 0;
    float beta = op->kaczmarz ? step : sigmoid_of(*place(run, row, op->beta + head));
    if (op->kaczmarz && op->clip) beta = clamped(beta);
    x->erase[0] = x->write[0] = factor * beta;
    *erase_width = *write_width = 1;
    return 1;
}

static Array one_row(float *x, long width) { return (Array){(char *)x, FLOAT32, width, 0, 0, 0, 1}; }

/* the output of value head `head`: normed, gated */
static void output(Head *x, const Run *run, const LinearHeads *op, long row, long head) {
    long n = op->value_dim;
    float *y = place(run, row, op->output + head * n);
    if (op->output_norm.kind != NO_NORM) norm_row(x->o, x->o, n, &op->output_norm);
    if (op->output_gate == NO_OUTPUT_GATE) {
        memcpy(y, x->o, n * sizeof(float));
        return;
    }
    project(x->v, x->inner, run, &op->output_gate_input, row, head * n, n);
    for (long at = 0; at < n; at += LANES) {
        vec gate = row_at(x->v, at, n);
        gate = op->output_gate == SILU_GATE ? silu_vec(gate) : sigmoid_vec(gate);
        store_row(y, at, n, row_at(x->o, at, n) * gate);
    }
}

static void value_head(Head *x, const Run *run, const LinearHeads *op, long row, long head, float energy) {
    long erase_width = 1, write_width = 1;
    channels(x->v, run, op, row, op->v, head * op->value_dim, op->value_dim, &op->conv_v, op->past_v);
    long decay_width = decay(x, run, op, row, head);
    int gated = erase_and_write(x, run, op, row, head, energy, &erase_width, &write_width);
    const StateTensor *state = &run->states[op->recurrent];
    Step step = step_of(op);
    step.q = one_row(x->q, op->key_dim), step.k = one_row(x->k, op->key_dim), step.v = one_row(x->v, op->value_dim);
    step.o = one_row(x->o, op->value_dim);
    if (decay_width) step.g = one_row(x->g, decay_width);
    if (gated) step.erase = one_row(x->erase, erase_width), step.write = one_row(x->write, write_width);
    step.state = (float *)state->data + state_row(run, row) * state->row + head * op->key_dim * op->value_dim;
    NAME(step)(&step, 0, x->step);
    output(x, run, op, row, head);
}

const char *NAME(linear_heads_state)(const Run *run, const LinearHeads *op, long task) {
    const StateTensor *state = &run->states[op->recurrent];
    long row = task / op->num_heads, key_head = task % op->num_heads, group = op->num_value_heads / op->num_heads;
    if (row >= run->num_rows) return NULL;
    long at = state_row(run, row) * state->row + key_head * group * op->key_dim * op->value_dim;
    return state->data + at * sizeof(float);
}

void NAME(linear_heads)(const Run *run, const LinearHeads *op, long task, float *memory) {
    Head x;
    carve(&x, memory, op);
    long row = task / op->num_heads, key_head = task % op->num_heads, group = op->num_value_heads / op->num_heads;
    long first = key_head * op->key_dim;
    channels(x.q, run, op, row, op->q, first, op->key_dim, &op->conv_q, op->past_q);
    channels(x.k, run, op, row, op->k, first, op->key_dim, &op->conv_k, op->past_k);
    map_features(x.q, op);
    map_features(x.k, op);
    float energy = op->kaczmarz ? sum_of_squares(x.k, op->key_dim) : 0.0f;
    if (op->rotation >= 0) {
        rotate(x.q, place(run, row, op->rotation), op->turned);
        rotate(x.k, place(run, row, op->rotation), op->turned);
    }
    for (long i = 0; i < group; i++) value_head(&x, run, op, row, key_head * group + i, energy);
}
