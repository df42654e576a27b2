/* A decode program: one token of a whole model as a list of instructions, and one run of it.
 *
 * Python lowers a model once to instructions (glade/infer/native), which name weights by address, activations by their
 * place in a workspace, and the model's state by an index into a table that every run brings along. An instruction is
 * split in tasks that any thread may take in any order; the next one begins when all of them are done. What a task
 * computes does not depend on the number of threads, to the bit, nor on the other rows of the batch; but several rows with
 * BFLOAT16 weights are rounded to that where the processor multiplies pairs of them, and a single one is not.
 *
 * Every member is 8 bytes wide, so that the records look the same from Python. */
#ifndef GLADE_PROGRAM_H
#define GLADE_PROGRAM_H

#include "array.h"

enum { INT8 = 2 }; /* beside FLOAT32 and BFLOAT16 */

typedef struct {
    const char *data; /* NULL: absent */
    int64_t dtype;    /* FLOAT32 or BFLOAT16 */
} Vector;

/* [rows, columns], row after row; INT8 with one fp32 scale a row */
typedef struct {
    const char *data;
    int64_t dtype;
    const float *scales;
    Vector bias;
    int64_t rows, columns;
} Matrix;

enum { NO_NORM, RMS, RMS_EPS_OUTSIDE, LAYER };

typedef struct {
    int64_t kind;
    Vector weight, bias;
    double eps;
} Norm;

/* one tensor of the model's state: [state rows, ...], contiguous */
typedef struct {
    char *data;
    int64_t dtype, row; /* elements from one row to the next */
} StateTensor;

/* x = table[id] (+ positions[position]) */
typedef struct {
    Matrix table, positions;
    int64_t output;
} Embed;

/* cos and sin of position * frequency, [frequencies] each, one after the other */
typedef struct {
    const float *frequencies;
    int64_t num, output;
} Rotation;

enum { NO_ACTIVATION, SWIGLU, GELU, TANH, SLIDE };
enum { STORE, ADD, ACCUMULATE, LOGITS };
enum { MOST_PARTS = 8 };

/* STORE: out = act(W norm(x) + b)      ADD: out += act(W norm(x) + b)      ACCUMULATE: out = act(out + W norm(x) + b)
 * LOGITS: as STORE, into the run's logits. SWIGLU: out = silu(part 0) * part 1, both of the same number of rows. */
typedef struct {
    Norm norm;
    int64_t input, columns, num_parts, activation, target;
    struct {
        Matrix matrix;
        int64_t output;
    } parts[MOST_PARTS];
} Matmul;

/* values that a head reads: at `input` of the workspace, or matrix times what stands there (rows of SiLU of it) */
typedef struct {
    int64_t input, silu;
    Matrix matrix; /* rows 0: absent */
} Projected;

enum { NO_DECAY, TABLE_DECAY, LOGSIGMOID_DECAY, TEMPERED_DECAY, SOFTPLUS_DECAY, BOUNDED_DECAY };
enum { IDENTITY, ELU1, RELU };
enum { NO_OUTPUT_GATE, SILU_GATE, SIGMOID_GATE };
enum { NO_KACZMARZ, FLOOR_EPS, ADD_EPS };

/* the body of a linear mixer, from the projections to what its output projection reads; a task is (row, key head) */
typedef struct {
    int64_t num_heads, num_value_heads, key_dim, value_dim;
    double scale;
    int64_t q, k, v, output;
    int64_t taps; /* of the convolutions, 0: none */
    Vector conv_q, conv_k, conv_v;
    int64_t past_q, past_k, past_v, recurrent; /* state tensors */
    int64_t silu, feature_map, unit;           /* after the convolutions; feature map and unit norm on q and k */
    int64_t rotation, turned;                  /* place of cos and sin, or -1; channels turned */
    int64_t decay, decay_heads, decay_channels;
    double decay_constant; /* normalizer or lower bound */
    Projected decay_input;
    Vector a_log, dt_bias; /* TABLE_DECAY: a_log is g, one a value head */
    int64_t beta, erase, write, eta; /* places, or -1: beta and eta one a value head, erase K a key head, write V */
    int64_t kaczmarz, clip, doubled;
    double kaczmarz_eps;
    Norm output_norm;
    int64_t output_gate;
    Projected output_gate_input;
} LinearHeads;

/* softmax attention of one token over a state of keys and values; a task is (row, key head) */
typedef struct {
    int64_t num_heads, num_kv_heads, key_dim, value_dim;
    double scale;
    int64_t q, k, v, gate, output; /* gate -1: none */
    Norm q_norm, k_norm;
    int64_t rotation, turned;
    int64_t keys, values, window; /* state tensors; window 0: the state grows */
} AttentionHeads;

/* x = norm(x) */
typedef struct {
    Norm norm;
    int64_t place, width;
} Normalize;

/* between the state and the workspace */
typedef struct {
    int64_t place, width, state, save;
} Copy;

enum { EMBED, ROTATION, MATMUL, LINEAR_HEADS, ATTENTION_HEADS, NORMALIZE, COPY };

typedef struct {
    int64_t op;
    union {
        Embed embed;
        Rotation rotation;
        Matmul matmul;
        LinearHeads linear;
        AttentionHeads attention;
        Normalize normalize;
        Copy copy;
    };
} Instruction;

/* One token for each of num_rows rows. */
typedef struct {
    int64_t num_rows, num_threads, num_instructions;
    const Instruction *instructions;
    float *workspace; /* [num_rows, row_floats], a row's places are multiples of 16 floats */
    int64_t row_floats;
    const StateTensor *states;
    int64_t num_state_rows;
    const int64_t *ids;
    const int64_t *slots;     /* NULL: row i is state row i */
    const int64_t *positions; /* [num_state_rows], tokens seen */
    int64_t most_positions;   /* rows of a table of learned positions; 0: no limit */
    int64_t vocab_size;
    float *logits; /* [num_rows, vocab_size] */
    /* every count of the tokens seen, `positions` among them: each goes up by one */
    int64_t *const *lengths;
    int64_t num_lengths;
} Run;

/* what a run answers besides 0 and NO_MEMORY (-1): nothing was changed then */
enum { BAD_ID = -2, BAD_SLOT = -3, BAD_POSITION = -4, FULL = -5 };

static inline long state_row(const Run *run, long row) { return run->slots ? run->slots[row] : row; }
static inline float *place(const Run *run, long row, long offset) {
    return run->workspace + row * run->row_floats + offset;
}

/* A thread at work on a run. */
typedef struct {
    float *memory;
    long prepared; /* the instruction whose input, normed or rounded, stands at the start of `memory`, or -1 */
} Worker;

/* What a build for one instruction set offers. */
typedef struct {
    size_t (*floats)(const Run *, const Instruction *);
    long (*num_tasks)(const Run *, const Instruction *);
    void (*run_task)(const Run *, const Instruction *, long task, Worker *);
} DecodeKernel;

#endif
