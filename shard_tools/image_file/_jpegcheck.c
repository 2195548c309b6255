/* Whether the entropy-coded data of JPEGs are sound, without making pixels of them.
 *
 * Of a baseline file of one scan every Huffman code is read and its extra bits are skipped;
 * coefficients are neither kept nor transformed, which takes a fifth of the time of libjpeg's
 * fastest decode. What shard_tools/image_file accepts by its header and the walk calls sound,
 * libjpeg decodes without an error or a warning. What it does not call sound may be so all the
 * same (progressive, several scans, odd segments ...) and is for libjpeg to judge: a mistake on
 * that side costs time only. Numbers in brackets are sections of ITU-T T.81.
 *
 * The codes are read from a copy of the scan without its stuffed zeros. One look into a table
 * takes as many symbols as have their codes inside WINDOW bits. Where the next look begins depends
 * on the last one, so that a processor waits most of the time; several files are therefore walked
 * side by side, in lanes, and the end of a block is no branch but another table.
 *
 * sound_until(files) -> for each the index of the end marker, or -1
 * next_marker(data, start) -> index of the next marker inside a scan, or -1
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined __GNUC__ && !defined __clang__
#pragma GCC optimize("no-tree-slp-vectorize") /* it would move a lane's fields in pairs, by memory */
#endif

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    WINDOW = 12,     /* bits of a look for several symbols */
    SHORT = 9,       /* of a look for one */
    LONGEST = 16,    /* bits of the longest code */
    MOST_EXTRA = 11, /* bits that follow a code, in a sound file of 8-bit pixels */
    PARTS = 4,       /* most components */
    MCU_BLOCKS = 10, /* most blocks of an MCU (B.2.3) */
    BLOCK = 64,      /* coefficients */
    LANES = 3,       /* files side by side: four need more registers than there are */
    AHEAD = 8,       /* bytes that may be read before their bits are taken */
    SLACK = 4 * AHEAD, /* zeros behind the data */
    MOST_KEPT = 1 << 20 /* bytes of a file that stay between two calls */
};

enum { SOI = 0xD8, EOI, SOS, DQT, DNL, DRI, RST0 = 0xD0, SOF0 = 0xC0, SOF1, DHT = 0xC4,
       APP0 = 0xE0, APP14 = 0xEE, APP15, COM = 0xFE };

/* Symbols taken at once: bits of all of them with their extra bits (6 bits), coefficients passed,
 * less than a block (7 bits), whether the last one ends the block (bit 15). FAR: the first code is
 * too long, or is none. */
typedef uint16_t Look;

enum { STEP = 6, ENDS = 0x8000, FAR = BLOCK << STEP };

static int bits_of(Look look) { return look & 63; }

static int step_of(Look look) { return look >> STEP & 127; }

typedef struct {
    int32_t limit[LONGEST + 1]; /* by length: the codes below it, left-aligned to LONGEST bits */
    int32_t index[LONGEST + 1]; /* by length: place of a code's symbol, less the code */
    uint8_t symbol[256];
    Look one[1 << SHORT];   /* 0: a longer code, or none */
    Look many[2 << WINDOW]; /* of AC symbols, for windows of w bits from 1 << w on */
} Table;

typedef struct {
    int name, quant, across, down; /* sampling factors */
    const Table *dc, *ac;
} Part;

typedef struct {
    Part part[PARTS];
    int parts, width, height, restart;
    int quants, dcs, acs; /* bit n = table n is there */
    const Part *block[MCU_BLOCKS];
    int blocks;
    long mcus;
    Table dc[4], ac[4];
} Picture;

/* What is read next: the DC symbol of a block of the MCU, or its AC symbols. */
typedef struct State State;
struct State {
    const Look *table[2];  /* behind a look that does not end the block, and that does */
    const State *next[2];
    const Table *codes;
    int dc;
};

/* ---------------------------------------------------------------- tables */

/* What a symbol whose code has `length` bits takes. 0: not in a sound file. */
static Look read_symbol(int symbol, int length, int dc) {
    int run = symbol >> 4, extra = symbol & 15;
    if (dc) return extra <= MOST_EXTRA && run == 0 ? (Look)(length + extra + (1 << STEP)) : 0;
    if (symbol == 0) return (Look)(length | ENDS);
    if (extra >= MOST_EXTRA || (extra == 0 && run != 15)) return 0;
    return (Look)(length + extra + ((run + 1) << STEP));
}

/* Looks into `width` bits for the first symbol. */
static void fill_one(const Table *table, int dc, int width, Look *looks) {
    memset(looks, 0, sizeof *looks << width);
    for (int n = 1, code = 0; n <= width; n++, code <<= 1)
        for (; code < table->limit[n] >> (LONGEST - n); code++) {
            Look look = read_symbol(table->symbol[code + table->index[n]], n, dc);
            Look *to = looks + (code << (width - n));
            for (int i = 0; i < 1 << (width - n); i++) to[i] = look;
        }
}

/* Looks into `width` bits for as many symbols as have their codes there: one of `table`, and behind
 * it those that `ac` has in a smaller window. */
static void fill_many(const Table *table, int dc, const Table *ac, int width, Look *looks) {
    for (int i = 0; i < 1 << width; i++) looks[i] = FAR;
    for (int n = 1, code = 0; n <= width; n++, code <<= 1)
        for (; code < table->limit[n] >> (LONGEST - n); code++) {
            Look first = read_symbol(table->symbol[code + table->index[n]], n, dc);
            Look *to = looks + (code << (width - n)), *end = to + (1 << (width - n));
            int left = width - bits_of(first);
            if (first == 0) continue;
            if (first & ENDS || left <= 0) {
                while (to < end) *to++ = first;
                continue;
            }
            const Look *rest = ac->many + (1 << left);
            for (; to < end; to += 1 << left)
                for (int i = 0; i < 1 << left; i++) {
                    int fits = step_of(first) + step_of(rest[i]) < BLOCK;
                    to[i] = (Look)(fits ? first + rest[i] : first);
                }
        }
}

/* The content of a DHT segment (B.2.4.2). 0: not sound. */
static int read_tables(Picture *picture, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        if (end - at < 1 + LONGEST || at[0] >> 4 > 1 || (at[0] & 15) > 3) return 0;
        int dc = at[0] >> 4 == 0, count = 0;
        Table *table = (dc ? picture->dc : picture->ac) + (at[0] & 15);
        int32_t code = 0;
        for (int n = 1; n <= LONGEST; n++) {
            table->index[n] = count - code;
            code += at[n];
            count += at[n];
            if (code >= 1 << n) return 0; /* a code of ones only, or none left */
            table->limit[n] = code << (LONGEST - n);
            code <<= 1;
        }
        at += 1 + LONGEST;
        if (count > 256 || end - at < count) return 0;
        memcpy(table->symbol, at, (size_t)count);
        for (int i = 0; dc && i < count; i++)
            if (at[i] > 15) return 0; /* libjpeg wants none, used or not */
        at += count;
        fill_one(table, dc, SHORT, table->one);
        for (int width = 1; !dc && width <= WINDOW; width++)
            fill_many(table, 0, table, width, table->many + (1 << width));
        *(dc ? &picture->dcs : &picture->acs) |= 1 << (table - (dc ? picture->dc : picture->ac));
    }
    return 1;
}

/* ---------------------------------------------------------------- codes */

/* One place in a scan. `bits`: the next ones on top; the low six bits of `have` tell how many of
 * them count. `count`: the coefficients that are read of a block, and from bit DONE on the blocks,
 * less their number in the piece. */
typedef struct {
    const uint8_t *at, *limit;
    uint64_t bits;
    int64_t count;
    const Look *table;
    const State *state;
    uint32_t have;
} Lane;

#define INLINE __attribute__((always_inline)) static inline

enum { DONE = 16 - STEP - 1, IN_BLOCK = (1 << DONE) - 1 };

/* At least 56 bits. Behind the data there are SLACK zeros; returns 0 far inside them. */
INLINE int refill(Lane *in) {
    uint64_t next;
    memcpy(&next, in->at, sizeof next);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    next = __builtin_bswap64(next);
#endif
    in->bits |= next >> (in->have & 63);
    in->at += ~in->have >> 3 & 7;
    in->have |= 56;
    return in->at <= in->limit;
}

/* The first symbol, of any length (F.2.2.3). 0: no code, or not in a sound file. */
static Look find_one(uint64_t bits, const Table *table, int dc) {
    int32_t top = (int32_t)(bits >> (64 - LONGEST));
    if (top < table->limit[SHORT]) return table->one[top >> (LONGEST - SHORT)];
    int n = SHORT + 1;
    while (n <= LONGEST && top >= table->limit[n]) n++;
    if (n > LONGEST) return 0;
    return read_symbol(table->symbol[(top >> (LONGEST - n)) + table->index[n]], n, dc);
}

/* One symbol where a look has none, or more than the block has room for. The count is positive
 * where the data are not sound. */
__attribute__((noinline, cold)) static void step_one(Lane *in) {
    Look look = find_one(in->bits, in->state->codes, in->state->dc);
    in->bits <<= look & 63;
    in->have -= look;
    int64_t count = in->count + step_of(look);
    int room = BLOCK - (int)(count & IN_BLOCK), end = look & ENDS || room == 0;
    if (look == 0 || room < 0) count = 1;
    if (end) count = (count & ~(int64_t)IN_BLOCK) + (1 << DONE);
    in->count = count;
    in->table = in->state->table[end];
    in->state = in->state->next[end];
}

/* One look (F.2.2), of LONGEST + MOST_EXTRA bits at most. 0: the piece ends, or is not sound. */
INLINE int step(Lane *in) {
    uint32_t look = in->table[in->bits >> (64 - WINDOW)];
    int64_t count = in->count + (look >> STEP);
    if (__builtin_expect(count & BLOCK, 0)) {
        Lane copy = *in; /* or the lane would have an address, and be in memory */
        step_one(&copy);
        *in = copy;
    } else {
        uint64_t end = look >> 15;
        in->bits <<= look & 63;
        in->have -= look;
        in->count = count & ((int64_t)(end - 1) | ~(int64_t)IN_BLOCK);
        in->table = in->state->table[end];
        in->state = in->state->next[end];
    }
    return in->count < 0;
}

/* Read on in all lanes until one of them stops; returns its number. The lanes are variables, not an
 * array, so that the compiler keeps them in registers. */
INLINE int run_lanes(Lane *lanes, const int number) {
    Lane a = lanes[0], b = lanes[1], c = lanes[2];
    int stopped;
#define EACH_LANE(act)                                                       \
    if (__builtin_expect(!act(&a), 0)) { stopped = 0; break; }               \
    if (number > 1 && __builtin_expect(!act(&b), 0)) { stopped = 1; break; } \
    if (number > 2 && __builtin_expect(!act(&c), 0)) { stopped = 2; break; }
    for (;;) {
        EACH_LANE(refill)
        EACH_LANE(step)
        EACH_LANE(step)
    }
#undef EACH_LANE
    lanes[0] = a, lanes[1] = b, lanes[2] = c;
    return stopped;
}

static int run(Lane *lanes, int number) {
    switch (number) {
    case 1: return run_lanes(lanes, 1);
    case 2: return run_lanes(lanes, 2);
    default: return run_lanes(lanes, LANES);
    }
}

/* ---------------------------------------------------------------- segments */

/* Content of a frame header (B.2.2). 0: not sound, or not for this walk. */
static int read_frame(Picture *picture, const uint8_t *at, const uint8_t *end) {
    if (picture->parts || end - at < 6 || at[0] != 8) return 0;
    picture->height = at[1] << 8 | at[2];
    picture->width = at[3] << 8 | at[4];
    int parts = at[5];
    if (!picture->height || !picture->width || parts < 1 || parts > PARTS) return 0;
    if (end - at != 6 + 3 * parts) return 0;
    for (int i = 0; i < parts; i++) {
        const uint8_t *from = at + 6 + 3 * i;
        Part part = {from[0], from[2], from[1] >> 4, from[1] & 15, NULL, NULL};
        if (part.across < 1 || part.across > 4 || part.down < 1 || part.down > 4) return 0;
        if (part.quant > 3) return 0;
        for (int j = 0; j < i; j++)
            if (picture->part[j].name == part.name) return 0;
        picture->part[i] = part;
    }
    picture->parts = parts;
    return 1;
}

/* The blocks of an MCU and the number of MCUs (A.2) from a scan header with all components. */
static int read_scan(Picture *picture, const uint8_t *at, const uint8_t *end) {
    int parts = picture->parts, across = 1, down = 1;
    if (!parts || end - at != 4 + 2 * parts || at[0] != parts) return 0;
    if (end[-3] != 0 || end[-2] != BLOCK - 1 || end[-1] != 0) return 0;
    for (int i = 0; i < parts; i++) {
        Part *part = &picture->part[i];
        int dc = at[2 + 2 * i] >> 4, ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != part->name || dc > 3 || ac > 3) return 0;
        if (!(picture->dcs >> dc & 1) || !(picture->acs >> ac & 1)) return 0;
        if (!(picture->quants >> part->quant & 1)) return 0;
        part->dc = &picture->dc[dc];
        part->ac = &picture->ac[ac];
        int blocks = parts > 1 ? part->across * part->down : 1;
        if (picture->blocks + blocks > MCU_BLOCKS) return 0;
        while (blocks--) picture->block[picture->blocks++] = part;
        if (parts > 1 && part->across > across) across = part->across;
        if (parts > 1 && part->down > down) down = part->down;
    }
    across *= 8, down *= 8;
    picture->mcus = (long)((picture->width + across - 1) / across)
                    * ((picture->height + down - 1) / down);
    return 1;
}

/* Content of a DQT segment (B.2.4.1). */
static int read_quants(Picture *picture, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        int size = 1 + (at[0] >> 4 ? 2 : 1) * BLOCK, number = at[0] & 15;
        if (end - at < size || number > 3) return 0;
        picture->quants |= 1 << number;
        at += size;
    }
    return 1;
}

/* One segment before the scan. 0: not sound, or libjpeg may have a remark. */
static int read_segment(Picture *picture, int kind, const uint8_t *at, const uint8_t *end) {
    switch (kind) {
    case SOF0:
    case SOF1: return read_frame(picture, at, end);
    case DHT: return read_tables(picture, at, end);
    case DQT: return read_quants(picture, at, end);
    case SOS: return read_scan(picture, at, end);
    case DRI:
        if (end - at == 2) picture->restart = at[0] << 8 | at[1];
        return end - at == 2;
    case APP0: return end - at < 7 || memcmp(at, "JFIF", 5) != 0 || at[5] == 1;
    case APP14: return end - at < 12 || memcmp(at, "Adobe", 5) != 0 || at[11] < 2;
    default: return (kind > APP0 && kind <= APP15) || kind == COM;
    }
}

/* ---------------------------------------------------------------- the walk */

/* Copy the scan up to the next marker without stuffed zeros; `*at` is moved behind the marker,
 * whose code is returned, or -1 at the end of the data. */
static int unstuff(const uint8_t **at, const uint8_t *end, uint8_t **to) {
    for (;;) {
        const uint8_t *next = memchr(*at, 0xFF, (size_t)(end - *at));
        if (!next || end - next < 2) return -1;
        size_t count = (size_t)(next - *at) + (next[1] == 0);
        memcpy(*to, *at, count);
        *to += count;
        *at = next + 2;
        if (next[1]) return next[1];
    }
}

/* A file on its way through a lane. */
typedef struct {
    Picture picture;
    Look first[PARTS][1 << WINDOW]; /* looks at a DC symbol and AC symbols behind it */
    State state[2 * MCU_BLOCKS];    /* of block i: 2 i its DC symbol, 2 i + 1 its AC symbols */
    const Look *start;              /* the table of state 0 */
    const uint8_t *data, *at, *end; /* the file; what is not read of it */
    uint8_t *room, *piece_end;      /* the piece in the lane: a restart interval */
    size_t rooms;
    long left;                      /* MCUs behind the piece */
    int marker, number;             /* the piece's marker and number */
    Py_ssize_t *result;
} Walk;

/* The states of the symbols of an MCU; the last ones lead to the first. */
static void make_states(Walk *walk) {
    Picture *picture = &walk->picture;
    const Look *first[PARTS];
    for (int i = 0; i < picture->parts; i++) {
        const Part *part = picture->part + i, *other = picture->part;
        while (other->dc != part->dc || other->ac != part->ac) other++;
        first[i] = walk->first[other - picture->part];
        if (other == part) fill_many(part->dc, 1, part->ac, WINDOW, walk->first[i]);
    }
    walk->start = first[picture->block[0] - picture->part];
    for (int i = 0; i < picture->blocks; i++) {
        int next = (i + 1) % picture->blocks;
        const Part *part = picture->block[i];
        State *dc = walk->state + 2 * i, *ac = dc + 1;
        dc->table[0] = part->ac->many + (1 << WINDOW);
        dc->table[1] = first[picture->block[next] - picture->part];
        dc->next[0] = ac;
        dc->next[1] = walk->state + 2 * next;
        *ac = *dc;
        dc->codes = part->dc, dc->dc = 1;
        ac->codes = part->ac, ac->dc = 0;
    }
}

/* Read the segments before the scan. 0: not sound, not for this walk, or no memory. */
static int open_file(Walk *walk) {
    Picture *picture = &walk->picture;
    const uint8_t *at = walk->data + 2;
    memset(picture, 0, offsetof(Picture, dc));
    if (walk->end - walk->data < 4 || walk->data[0] != 0xFF || walk->data[1] != SOI) return 0;
    for (int kind = SOI; kind != SOS;) {
        if (walk->end - at < 4 || at[0] != 0xFF) return 0;
        kind = at[1];
        int size = at[2] << 8 | at[3];
        if (size < 2 || walk->end - at < 2 + size) return 0;
        if (!read_segment(picture, kind, at + 4, at + 2 + size)) return 0;
        at += 2 + size;
    }
    size_t need = (size_t)(walk->end - at) + SLACK;
    if (walk->rooms < need) {
        free(walk->room);
        walk->room = malloc(need);
        walk->rooms = walk->room ? need : 0;
        if (!walk->room) return 0;
    }
    make_states(walk);
    walk->at = at;
    walk->left = picture->mcus;
    walk->number = -1;
    return 1;
}

/* Put the next piece into the lane. */
static void open_piece(Walk *walk, Lane *lane) {
    const Picture *picture = &walk->picture;
    long count = walk->left;
    if (picture->restart && picture->restart < count) count = picture->restart;
    walk->left -= count;
    walk->number++;
    walk->piece_end = walk->room;
    walk->marker = unstuff(&walk->at, walk->end, &walk->piece_end);
    memset(walk->piece_end, 0, SLACK);
    Lane start = {walk->room, walk->piece_end + AHEAD, 0, -((int64_t)(count * picture->blocks) << DONE),
                  walk->start, walk->state, 0};
    *lane = start;
}

/* Judge the piece in the lane and put the next one there. 0: there is none, and the result is
 * known. */
static int next_piece(Walk *walk, Lane *lane) {
    int64_t bits = (walk->piece_end - lane->at) * 8 + (lane->have & 63);
    if (lane->count != 0 || bits < 0 || bits >= 8) return 0; /* it fills its data to the last byte */
    if (walk->left == 0) {
        if (walk->marker == EOI) *walk->result = walk->at - 2 - walk->data;
        return 0;
    }
    if (walk->marker != RST0 + (walk->number & 7)) return 0;
    open_piece(walk, lane);
    return 1;
}

/* results: -1 where a file is not sound, or not known to be. */
static void walk_files(Walk **walks, const Py_buffer *files, Py_ssize_t count,
                       Py_ssize_t *results) {
    Lane lanes[LANES] = {0};
    Py_ssize_t next = 0;
    for (int live = 0;;) {
        for (; live < LANES && next < count; next++) {
            Walk *walk = walks[live];
            results[next] = -1;
            walk->result = results + next;
            walk->data = files[next].buf;
            walk->end = walk->data + files[next].len;
            if (open_file(walk)) open_piece(walk, &lanes[live++]);
        }
        if (live == 0) return;
        int stopped = run(lanes, live);
        if (next_piece(walks[stopped], &lanes[stopped])) continue;
        Walk *free_one = walks[stopped];
        live--;
        lanes[stopped] = lanes[live];
        walks[stopped] = walks[live];
        walks[live] = free_one;
    }
}

/* ---------------------------------------------------------------- module */

/* Those that are in no thread's hands; all under the interpreter's lock. */
static Walk *spare[LANES];

static Walk *take_walk(int lane) {
    Walk *walk = spare[lane];
    spare[lane] = NULL;
    if (walk) return walk;
    walk = malloc(sizeof *walk);
    if (walk) walk->room = NULL, walk->rooms = 0;
    return walk;
}

static void give_walk(Walk *walk, int lane) {
    if (spare[lane] || walk->rooms > MOST_KEPT) {
        free(walk->room);
        free(walk);
    } else {
        spare[lane] = walk;
    }
}

static PyObject *results_of(const Py_buffer *files, Py_ssize_t count) {
    Walk *walks[LANES] = {0};
    Py_ssize_t *results = PyMem_New(Py_ssize_t, (size_t)count + 1);
    int fine = results != NULL;
    for (int i = 0; i < LANES && i < count; i++) {
        walks[i] = take_walk(i);
        if (!walks[i]) fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        walk_files(walks, files, count, results);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < LANES; i++)
        if (walks[i]) give_walk(walks[i], i);
    PyObject *list = fine ? PyList_New(count) : PyErr_NoMemory();
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *number = PyLong_FromSsize_t(results[i]);
        if (number) PyList_SET_ITEM(list, i, number);
        else Py_CLEAR(list);
    }
    PyMem_Free(results);
    return list;
}

static PyObject *py_sound_until(PyObject *self, PyObject *arg) {
    (void)self;
    PyObject *given = PySequence_Fast(arg, "sound_until takes a sequence of files"), *list = NULL;
    if (!given) return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(given), held = 0;
    Py_buffer *files = PyMem_New(Py_buffer, (size_t)count + 1);
    if (!files) PyErr_NoMemory();
    for (; files && held < count; held++)
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(given, held), files + held, PyBUF_SIMPLE) < 0)
            break;
    if (files && held == count) list = results_of(files, count);
    while (held > 0) PyBuffer_Release(files + --held);
    PyMem_Free(files);
    Py_DECREF(given);
    return list;
}

static PyObject *py_next_marker(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer data;
    Py_ssize_t start, found = -1;
    if (!PyArg_ParseTuple(args, "y*n:next_marker", &data, &start)) return NULL;
    const uint8_t *bytes = data.buf, *end = bytes + data.len, *at = NULL;
    if (start >= 0 && start < data.len) at = bytes + start;
    while (at && (at = memchr(at, 0xFF, (size_t)(end - at))) && end - at > 1) {
        if (at[1] == 0xFF) at += 1; /* may begin a marker itself */
        else if (at[1] == 0 || (at[1] & ~7) == RST0) at += 2;
        else {
            found = at - bytes;
            break;
        }
    }
    PyBuffer_Release(&data);
    return PyLong_FromSsize_t(found);
}

static PyMethodDef methods[] = {
    {"sound_until", py_sound_until, METH_O,
     "sound_until(files) -> for each the index of the end marker of a baseline JPEG that libjpeg "
     "decodes without a warning; -1: not, or not known"},
    {"next_marker", py_next_marker, METH_VARARGS,
     "next_marker(data, start) -> index of the next marker that is neither escaped data nor a "
     "restart marker, or -1"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpegcheck", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpegcheck(void) { return PyModule_Create(&module); }
