/* Sockets of the guest to other machines, for tests. A connection is a command's standard input and output:
 *
 *   vsock listen PORT COMMAND...          for every connection that comes; prints "listening PORT" first
 *   vsock connect CID PORT COMMAND...     for one connection, and ends as the command does
 *   vsock echo PORT                       answers what comes on any number of connections, in one process
 *   vsock many CID PORT COUNT             COUNT simultaneous connections, a line and its answer on each
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static void fail(const char *what)
{
    printf("vsock: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int vsock(void)
{
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

static struct sockaddr_vm address(unsigned cid, const char *port)
{
    struct sockaddr_vm addr = { .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = strtoul(port, NULL, 0) };
    return addr;
}

static int listen_on(const char *port)
{
    struct sockaddr_vm addr = address(VMADDR_CID_ANY, port);
    int fd = vsock();
    if (bind(fd, (struct sockaddr *)&addr, sizeof addr) || listen(fd, 1024))
        fail("listen");
    printf("listening %s\n", port);
    fflush(stdout);
    return fd;
}

static int connect_to(const char *cid, const char *port)
{
    struct sockaddr_vm addr = address(strtoul(cid, NULL, 0), port);
    int fd = vsock();
    if (connect(fd, (struct sockaddr *)&addr, sizeof addr))
        fail("connect");
    return fd;
}

static void run(int fd, char **command)
{
    dup2(fd, 0);
    dup2(fd, 1);
    execvp(command[0], command);
    fail(command[0]);
}

static void serve(const char *port, char **command)
{
    int listener = listen_on(port);
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            fail("accept");
        if (fork() == 0) {
            signal(SIGCHLD, SIG_DFL);
            run(fd, command);
        }
        close(fd);
    }
}

static void echo(const char *port)
{
    static struct pollfd fds[2048];
    static char buffer[4096];
    int count = 1;
    fds[0].fd = listen_on(port);
    fds[0].events = POLLIN;
    for (;;) {
        if (poll(fds, count, -1) < 0)
            fail("poll");
        for (int i = count - 1; i > 0; i--) {
            if (!fds[i].revents)
                continue;
            ssize_t n = read(fds[i].fd, buffer, sizeof buffer);
            if (n <= 0 || write(fds[i].fd, buffer, n) != n) {
                close(fds[i].fd);
                fds[i] = fds[--count];
            }
        }
        if (fds[0].revents && count < 2048) {
            fds[count].fd = accept4(fds[0].fd, NULL, NULL, SOCK_CLOEXEC);
            if (fds[count].fd < 0)
                fail("accept");
            fds[count].events = POLLIN;
            fds[count++].revents = 0;
        }
    }
}

static void many(const char *cid, const char *port, int count)
{
    char line[32], answer[32];
    int *fds = calloc(count, sizeof *fds);
    for (int i = 0; i < count; i++)
        fds[i] = connect_to(cid, port);
    for (int i = 0; i < count; i++)
        if (write(fds[i], line, sprintf(line, "line %04d\n", i)) != 10)
            fail("write");
    for (int i = 0; i < count; i++) {
        sprintf(line, "line %04d\n", i);
        if (recv(fds[i], answer, 10, MSG_WAITALL) != 10 || memcmp(line, answer, 10))
            fail("answer");
    }
    printf("answers: %d\n", count);
}

int main(int argc, char **argv)
{
    struct rlimit files = { 4096, 4096 };
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    if (argc > 3 && !strcmp(argv[1], "listen"))
        serve(argv[2], argv + 3);
    else if (argc > 4 && !strcmp(argv[1], "connect"))
        run(connect_to(argv[2], argv[3]), argv + 4);
    else if (argc == 3 && !strcmp(argv[1], "echo"))
        echo(argv[2]);
    else if (argc == 5 && !strcmp(argv[1], "many"))
        many(argv[2], argv[3], atoi(argv[4]));
    else
        fail("see vsock.c");
    return 0;
}
