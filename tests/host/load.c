// A load for benchmarks, the same inside every monitor's guest.
//
//   load disk DEVICE read|write seq|rand BLOCK DEPTH COUNT   COUNT requests around the guest's page cache
//   load send ADDRESS PORT MIB                               a TCP stream to a host
//   load receive ADDRESS PORT MIB                            a TCP stream from a host
//   load serve PORT                                          the other side of both, for ever
//
// Prints the nanoseconds that it took.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// The same numbers in each run.
static uint32_t next_random(void) {
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 16;
}

static void disk(char **arg) {
    int write = !strcmp(arg[1], "write"), random = !strcmp(arg[2], "rand");
    long block = atol(arg[3]), depth = atol(arg[4]), count = atol(arg[5]);
    int fd = open(arg[0], O_RDWR | O_DIRECT);
    if (fd < 0)
        die(arg[0]);
    long blocks = lseek(fd, 0, SEEK_END) / block;
    char *buffers;
    if (posix_memalign((void **)&buffers, 4096, block * depth))
        die("memory");
    memset(buffers, 7, block * depth);
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context))
        die("io_setup");
    struct iocb requests[depth], *begun[depth];
    struct io_event done[depth];
    long started = 0, finished = 0, free[depth], spare = depth;
    for (long i = 0; i < depth; i++)
        free[i] = i;
    uint64_t start = now();
    while (finished < count) {
        long n = 0;
        for (; spare && started < count; started++, n++) {
            long slot = free[--spare], at = random ? next_random() % blocks : started % blocks;
            requests[slot] = (struct iocb){
                .aio_data = slot,
                .aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                .aio_fildes = fd,
                .aio_buf = (uintptr_t)(buffers + slot * block),
                .aio_nbytes = block,
                .aio_offset = at * block,
            };
            begun[n] = &requests[slot];
        }
        if (n && syscall(SYS_io_submit, context, n, begun) != n)
            die("io_submit");
        long got = syscall(SYS_io_getevents, context, 1, depth, done, NULL);
        if (got < 0)
            die("io_getevents");
        for (long i = 0; i < got; i++) {
            if (done[i].res != block)
                die("a request");
            free[spare++] = done[i].data;
        }
        finished += got;
    }
    printf("%llu\n", (unsigned long long)(now() - start));
}

static char bytes[256 << 10];

// Moves bytes to or from a socket; with 0, until its end.
static void pump(int fd, int out, uint64_t left) {
    for (int all = !left; all || left;) {
        size_t len = all || left > sizeof bytes ? sizeof bytes : left;
        ssize_t n = out ? write(fd, bytes, len) : read(fd, bytes, len);
        if (n < 0)
            die("a stream");
        if (n == 0 && all)
            return;
        if (n == 0)
            errno = EPIPE, die("a stream");
        left -= all ? 0 : n;
    }
}

// The client first says whether it will send, and how many MiB; the side that has received everything answers with a
// byte.
struct hello {
    uint32_t sends, mib;
};

static void net(int sends, char **arg) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(arg[1]))};
    struct hello hello = {sends, atol(arg[2])};
    char end = 1;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (!inet_aton(arg[0], &to.sin_addr) || connect(fd, (struct sockaddr *)&to, sizeof to))
        die(arg[0]);
    uint64_t start = now();
    if (write(fd, &hello, sizeof hello) != sizeof hello)
        die("hello");
    pump(fd, sends, (uint64_t)hello.mib << 20);
    if (sends && read(fd, &end, 1) != 1)
        die("the end");
    printf("%llu\n", (unsigned long long)(now() - start));
}

static void serve(const char *port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    struct hello hello;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 8))
        die("listen");
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0 || read(fd, &hello, sizeof hello) != sizeof hello)
            die("a client");
        pump(fd, !hello.sends, (uint64_t)hello.mib << 20);
        if (hello.sends && write(fd, "", 1) != 1)
            die("the end");
        close(fd);
    }
}

int main(int count, char **arg) {
    if (count == 8 && !strcmp(arg[1], "disk"))
        disk(arg + 2);
    else if (count == 5 && !strcmp(arg[1], "send"))
        net(1, arg + 2);
    else if (count == 5 && !strcmp(arg[1], "receive"))
        net(0, arg + 2);
    else if (count == 3 && !strcmp(arg[1], "serve"))
        serve(arg[2]);
    else {
        fprintf(stderr, "usage: see load.c\n");
        return 2;
    }
}
