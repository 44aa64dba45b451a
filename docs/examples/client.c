/* A client in C: cc client.c -o client -lzmq -lmsgpackc   (-lmsgpack-c from version 6); ./client ENDPOINT IMAGE [MASK.pgm]
 *
 * Prints a line for each object: its category, score, box, and the number of its pixels; writes the first one's mask. */
#include <errno.h>
#include <msgpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

enum { REPEAT_MS = 5000 };
typedef const msgpack_object *Object;

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "client: %s: %s\n", what, why);
    exit(1);
}

static void *allocate(size_t bytes)
{
    void *memory = calloc(bytes + 1, 1);
    if (!memory)
        fail("memory", strerror(errno));
    return memory;
}

/* The value of a key; an answer without it breaks the protocol. */
static Object get(Object map, const char *key)
{
    for (uint32_t i = 0; map->type == MSGPACK_OBJECT_MAP && i < map->via.map.size; i++) {
        const msgpack_object_kv *entry = map->via.map.ptr + i;
        msgpack_object_str name = entry->key.via.str;
        if (entry->key.type == MSGPACK_OBJECT_STR && name.size == strlen(key) && !memcmp(name.ptr, key, name.size))
            return &entry->val;
    }
    fail(key, "not in the answer");
    return NULL;
}

static int is(Object text, const char *value)
{
    return text->via.str.size == strlen(value) && !memcmp(text->via.str.ptr, value, text->via.str.size);
}

static double number(Object value)
{
    switch (value->type) {
    case MSGPACK_OBJECT_POSITIVE_INTEGER: return (double)value->via.u64;
    case MSGPACK_OBJECT_NEGATIVE_INTEGER: return (double)value->via.i64;
    default: return value->via.f64;
    }
}

static void put(msgpack_packer *header, const char *text)
{
    msgpack_pack_str(header, strlen(text));
    msgpack_pack_str_body(header, text, strlen(text));
}

static void submit(void *dealer, const char *image, size_t bytes)
{
    msgpack_sbuffer buffer;
    msgpack_packer header;
    msgpack_sbuffer_init(&buffer);
    msgpack_packer_init(&header, &buffer, msgpack_sbuffer_write);
    msgpack_pack_map(&header, 4);
    put(&header, "type"), put(&header, "submit");
    put(&header, "job"), put(&header, "1");
    put(&header, "image"), msgpack_pack_map(&header, 1), put(&header, "kind"), put(&header, "encoded");
    put(&header, "options"), msgpack_pack_map(&header, 1), put(&header, "score_threshold");
    msgpack_pack_double(&header, 0.3);
    zmq_send(dealer, "BMD1", 4, ZMQ_SNDMORE);
    zmq_send(dealer, buffer.data, buffer.size, ZMQ_SNDMORE);
    if (zmq_send(dealer, image, bytes, 0) < 0)
        fail("send", zmq_strerror(errno));
    msgpack_sbuffer_destroy(&buffer);
}

/* A byte for each pixel, 0 or 1, column after column; the caller frees it. */
static char *decode_mask(Object counts, size_t pixels)
{
    const char *at = counts->via.str.ptr, *end = at + counts->via.str.size;
    char *mask = allocate(pixels);
    long last[2] = {0, 0};
    size_t pixel = 0;
    for (int index = 0; at < end; index++) {
        long run = 0, bits;
        int shift = 0;
        do {
            bits = *at++ - 48;
            run |= (bits & 31) << shift;
            shift += 5;
        } while (bits & 32 && at < end && shift < 35);
        if (bits & 16)
            run |= -(1L << shift);
        if (index > 2)
            run += last[index % 2];
        if (run < 0 || (size_t)run > pixels - pixel)
            fail("counts", "not a mask");
        memset(mask + pixel, index % 2, run);
        pixel += run;
        last[index % 2] = run;
    }
    return mask;
}

static void write_mask(const char *path, const char *mask, size_t height, size_t width)
{
    FILE *file = fopen(path, "wb");
    if (!file)
        fail(path, strerror(errno));
    fprintf(file, "P5 %zu %zu 255\n", width, height);
    for (size_t y = 0; y < height; y++)
        for (size_t x = 0; x < width; x++)
            fputc(255 * mask[x * height + y], file);
    if (fclose(file))
        fail(path, strerror(errno));
}

static void print(Object objects, const char *mask_path)
{
    for (uint32_t i = 0; i < objects->via.array.size; i++) {
        Object object = objects->via.array.ptr + i, rle = get(object, "segmentation");
        Object name = get(object, "category_name"), box = get(object, "bbox")->via.array.ptr;
        Object size = get(rle, "size")->via.array.ptr;
        size_t height = size[0].via.u64, width = size[1].via.u64, area = 0;
        char *mask = decode_mask(get(rle, "counts"), height * width);
        for (size_t pixel = 0; pixel < height * width; pixel++)
            area += mask[pixel];
        printf("%.*s %.3f box %.1f %.1f %.1f %.1f pixels %zu\n", (int)name->via.str.size, name->via.str.ptr,
               number(get(object, "score")), number(box), number(box + 1), number(box + 2), number(box + 3), area);
        if (i == 0 && mask_path)
            write_mask(mask_path, mask, height, width);
        free(mask);
    }
}

static char *read_file(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        fail(path, strerror(errno));
    *bytes = ftell(file);
    rewind(file);
    char *data = allocate(*bytes);
    if (fread(data, 1, *bytes, file) != *bytes)
        fail(path, "cannot be read");
    fclose(file);
    return data;
}

static msgpack_unpacked unpack(zmq_msg_t *frame)
{
    msgpack_unpacked unpacked;
    msgpack_unpacked_init(&unpacked);
    if (msgpack_unpack_next(&unpacked, zmq_msg_data(frame), zmq_msg_size(frame), NULL) != MSGPACK_UNPACK_SUCCESS)
        fail("answer", "not msgpack");
    return unpacked;
}

int main(int argc, char **argv)
{
    size_t bytes;
    if (argc < 3)
        fail("usage", "client ENDPOINT IMAGE [MASK.pgm]");
    char *image = read_file(argv[2], &bytes);
    void *context = zmq_ctx_new(), *dealer = zmq_socket(context, ZMQ_DEALER);
    int repeat_ms = REPEAT_MS, no_linger = 0, wait_for_connection = 1;
    zmq_setsockopt(dealer, ZMQ_RCVTIMEO, &repeat_ms, sizeof repeat_ms);
    zmq_setsockopt(dealer, ZMQ_LINGER, &no_linger, sizeof no_linger);
    zmq_setsockopt(dealer, ZMQ_IMMEDIATE, &wait_for_connection, sizeof wait_for_connection);
    if (zmq_connect(dealer, argv[1]))
        fail(argv[1], zmq_strerror(errno));
    for (int done = 0; !done;) {
        submit(dealer, image, bytes); /* after silence again: the daemon may have forgotten it, else nothing changes */
        zmq_msg_t frames[3];
        int count = 0;
        for (int more = 1; more && count < 3; count++) {
            zmq_msg_init(&frames[count]);
            if (zmq_msg_recv(&frames[count], dealer, 0) < 0)
                break;
            more = zmq_msg_more(&frames[count]);
        }
        if (count < 2)
            continue;
        msgpack_unpacked head = unpack(&frames[1]);
        if (is(get(&head.data, "type"), "result")) {
            msgpack_unpacked objects = unpack(&frames[2]);
            print(&objects.data, argc > 3 ? argv[3] : NULL);
            msgpack_unpacked_destroy(&objects);
            done = 1;
        } else {
            Object code = get(&head.data, "code"), reason = get(&head.data, "reason");
            Object retry_after_s = get(&head.data, "retry_after_s");
            fprintf(stderr, "%.*s: %.*s\n", (int)code->via.str.size, code->via.str.ptr, (int)reason->via.str.size,
                    reason->via.str.ptr);
            if (retry_after_s->type == MSGPACK_OBJECT_NIL || is(code, "timeout"))
                return 1;
            usleep((useconds_t)(1e6 * number(retry_after_s)));
        }
        msgpack_unpacked_destroy(&head);
        while (count--)
            zmq_msg_close(&frames[count]);
    }
    zmq_close(dealer);
    zmq_ctx_destroy(context);
    free(image);
    return 0;
}
