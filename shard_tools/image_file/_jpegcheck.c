/* Whether a JPEG's entropy-coded data are sound, without making pixels of them.
 *
 * Of a baseline file of one scan every Huffman code is read and its extra bits are skipped;
 * coefficients are neither kept nor transformed, which takes a third of the time of libjpeg's
 * fastest decode. What shard_tools/image_file accepts by its header and the walk calls sound,
 * libjpeg decodes without an error or a warning. What it does not call sound may be so all the
 * same (progressive, several scans, odd segments ...) and is for libjpeg to judge: a mistake on
 * that side costs time only. Numbers in brackets are sections of ITU-T T.81.
 *
 * The codes are read from a copy of the scan without its stuffed zeros. One look into a table
 * takes as many symbols as have their codes inside WINDOW bits.
 *
 * sound_until(data) -> index of the end marker, or -1
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

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
    /* Zeros behind the data: an MCU that begins inside them ends inside these. */
    SLACK = MCU_BLOCKS * BLOCK * (LONGEST + MOST_EXTRA) / 8 + 16
};

enum { SOI = 0xD8, EOI, SOS, DQT, DNL, DRI, RST0 = 0xD0, SOF0 = 0xC0, SOF1, DHT = 0xC4,
       APP0 = 0xE0, APP14 = 0xEE, APP15, COM = 0xFE };

/* Symbols taken at once: bits of all of them with their extra bits (6 bits), coefficients passed
 * (8 bits), whether the last one ends the block. 0: the first code is too long, or is none. */
typedef uint16_t Look;

enum { STEP = 6, ENDS = 0x8000 };

static int bits_of(Look look) { return look & 63; }

static int step_of(Look look) { return look >> STEP & 255; }

typedef struct {
    int there;
    int32_t limit[LONGEST + 1]; /* by length: the codes below it, left-aligned to LONGEST bits */
    int32_t index[LONGEST + 1]; /* by length: place of a code's symbol, less the code */
    uint8_t symbol[256];
    Look one[1 << SHORT];
    Look many[2 << WINDOW]; /* for windows of w bits from 1 << w on */
} Table;

typedef struct {
    int name, quant, across, down; /* sampling factors */
    const Table *dc, *ac;
} Part;

typedef struct {
    Table dc[4], ac[4];
    Part part[PARTS];
    int parts, width, height, quants, restart; /* quants: bit q = table q is there */
    const Part *block[MCU_BLOCKS];
    int blocks;
    long mcus;
} Picture;

/* ---------------------------------------------------------------- tables */

/* What a symbol whose code has `length` bits takes. 0: not in a sound file. */
static Look read_symbol(int symbol, int length, int dc) {
    int run = symbol >> 4, extra = symbol & 15;
    if (dc) return extra <= MOST_EXTRA && run == 0 ? (Look)(length + extra) : 0;
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

/* Looks for as many AC symbols as have their codes inside the window: behind the first one, those of
 * a smaller window. */
static void fill_many(Table *table) {
    table->many[1] = 0;
    for (int width = 1; width <= WINDOW; width++) {
        Look *looks = table->many + (1 << width);
        memset(looks, 0, sizeof *looks << width);
        for (int n = 1, code = 0; n <= width; n++, code <<= 1)
            for (; code < table->limit[n] >> (LONGEST - n); code++) {
                Look first = read_symbol(table->symbol[code + table->index[n]], n, 0);
                Look *to = looks + (code << (width - n)), *end = to + (1 << (width - n));
                int left = width - bits_of(first);
                if (first == 0 || first & ENDS || left <= 0) {
                    while (to < end) *to++ = first;
                    continue;
                }
                const Look *rest = table->many + (1 << left);
                for (; to < end; to += 1 << left)
                    for (int i = 0; i < 1 << left; i++) to[i] = (Look)(rest[i] + first);
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
        if (!dc) fill_many(table); /* between two DC codes there is a block */
        table->there = 1;
    }
    return 1;
}

/* ---------------------------------------------------------------- codes */

/* The next bits on top; the low six bits of `have` tell how many of them count. */
typedef struct {
    const uint8_t *at;
    uint64_t bits;
    unsigned have;
} Bits;

/* At least 56 bits. Behind the data there are SLACK zeros; walk_scan looks whether it ran there. */
static inline void refill(Bits *in) {
    uint64_t next;
    memcpy(&next, in->at, sizeof next);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    next = __builtin_bswap64(next);
#endif
    in->bits |= next >> (in->have & 63);
    in->at += ~in->have >> 3 & 7;
    in->have |= 56;
}

static inline void take(Bits *in, Look look) {
    in->bits <<= look & 63;
    in->have -= look;
}

/* The first symbol, of any length (F.2.2.3). 0: no code, or not in a sound file. */
static Look find_one(const Bits *in, const Table *table, int dc) {
    int32_t top = (int32_t)(in->bits >> (64 - LONGEST));
    if (top < table->limit[SHORT]) return table->one[top >> (LONGEST - SHORT)];
    int n = SHORT + 1;
    while (n <= LONGEST && top >= table->limit[n]) n++;
    if (n > LONGEST) return 0;
    return read_symbol(table->symbol[(top >> (LONGEST - n)) + table->index[n]], n, dc);
}

/* One block (F.2.2). 0: not sound. */
static inline int walk_block(Bits *in, const Part *part) {
    const Look *many = part->ac->many + (1 << WINDOW);
    refill(in);
    Look look = find_one(in, part->dc, 1);
    if (!look) return 0;
    take(in, look);
    for (int k = 1;;) {
        refill(in);
        for (int turn = 0; turn < 2; turn++) { /* of LONGEST + MOST_EXTRA bits at most */
            look = many[in->bits >> (64 - WINDOW)];
            if (!look || k + step_of(look) >= BLOCK) { /* the block may end before the last one */
                look = find_one(in, part->ac, 0);
                if (!look) return 0;
            }
            take(in, look);
            if (look & ENDS) return 1;
            k += step_of(look);
            if (k >= BLOCK) return k == BLOCK;
        }
    }
}

/* `mcus` MCUs that fill the data [at, end) up to the last byte. */
static int walk_scan(const Picture *picture, const uint8_t *at, const uint8_t *end, long mcus) {
    Bits in = {at, 0, 0};
    for (; mcus > 0; mcus--) {
        for (int i = 0; i < picture->blocks; i++)
            if (!walk_block(&in, picture->block[i])) return 0;
        if (in.at - (in.have & 63) / 8 > end) return 0;
    }
    int64_t left = (end - in.at) * 8 + (in.have & 63);
    return left >= 0 && left < 8;
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
        if (!picture->dc[dc].there || !picture->ac[ac].there) return 0;
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

/* The scan at `at`, restart interval by restart interval, with nothing behind it but its end. */
static const uint8_t *walk_picture(const Picture *picture, const uint8_t *at, const uint8_t *end,
                                   uint8_t *room) {
    long left = picture->mcus;
    for (int number = 0;; number++) {
        long count = picture->restart && picture->restart < left ? picture->restart : left;
        uint8_t *to = room;
        int marker = unstuff(&at, end, &to);
        memset(to, 0, SLACK);
        if (!walk_scan(picture, room, to, count)) return NULL;
        left -= count;
        if (left == 0) return marker == EOI ? at - 2 : NULL;
        if (marker != RST0 + (number & 7)) return NULL;
    }
}

/* The end marker of a sound picture, or NULL. room: `length` + SLACK bytes. */
static const uint8_t *walk(Picture *picture, const uint8_t *data, size_t length, uint8_t *room) {
    const uint8_t *at = data + 2, *end = data + length;
    if (length < 4 || data[0] != 0xFF || data[1] != SOI) return NULL;
    for (;;) {
        if (end - at < 4 || at[0] != 0xFF) return NULL;
        int kind = at[1], size = at[2] << 8 | at[3];
        if (size < 2 || end - at < 2 + size) return NULL;
        if (!read_segment(picture, kind, at + 4, at + 2 + size)) return NULL;
        at += 2 + size;
        if (kind == SOS) return walk_picture(picture, at, end, room);
    }
}

static PyObject *py_sound_until(PyObject *self, PyObject *data) {
    (void)self;
    Py_buffer view;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0) return NULL;
    Picture *picture = calloc(1, sizeof *picture);
    uint8_t *room = malloc((size_t)view.len + SLACK);
    PyObject *result = NULL;
    if (picture && room) {
        const uint8_t *end;
        Py_BEGIN_ALLOW_THREADS
        end = walk(picture, view.buf, (size_t)view.len, room);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSsize_t(end ? end - (const uint8_t *)view.buf : -1);
    } else {
        PyErr_NoMemory();
    }
    free(picture);
    free(room);
    PyBuffer_Release(&view);
    return result;
}

static PyMethodDef methods[] = {
    {"sound_until", py_sound_until, METH_O,
     "sound_until(data) -> index of the end marker of a baseline JPEG that libjpeg decodes without "
     "a warning; -1: not, or not known"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpegcheck", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpegcheck(void) { return PyModule_Create(&module); }
