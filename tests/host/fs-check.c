/* Makes calls on a file system and prints a line with the result of each, to be compared with those on another one.
 *
 *   fs-check DIR             everything; DIR is empty and belongs to root, who runs this
 *   fs-check DIR user        without the calls that only root may make
 *   fs-check DIR PART        one part
 *
 * Nothing is printed that may differ between correct file systems: no inode numbers, no clock times, no space used.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static int root = 1;

static long said(const char *what, long result)
{
    if (result < 0)
        printf("%s: %s\n", what, strerrorname_np(errno));
    else
        printf("%s: ok\n", what);
    return result;
}

static void number(const char *what, long long value) { printf("%s: %lld\n", what, value); }

/* For calls that return a count. */
static void count(const char *what, long result)
{
    if (result < 0)
        said(what, result);
    else
        number(what, result);
}

static int make(const char *path, mode_t mode, const char *content)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, mode);
    if (fd < 0 || write(fd, content, strlen(content)) != (ssize_t)strlen(content))
        printf("cannot make %s: %s\n", path, strerror(errno));
    return fd;
}

static void made(const char *path, mode_t mode, const char *content) { close(make(path, mode, content)); }

static void mode_of(const char *what, const char *path)
{
    struct stat st;
    if (lstat(path, &st))
        said(what, -1);
    else if (root)
        printf("%s: %o links %d owner %d:%d size %lld\n", what, st.st_mode, S_ISDIR(st.st_mode) ? 0 : (int)st.st_nlink,
               st.st_uid, st.st_gid, S_ISDIR(st.st_mode) ? 0 : (long long)st.st_size);
    else
        printf("%s: %o links %d size %lld\n", what, st.st_mode, S_ISDIR(st.st_mode) ? 0 : (int)st.st_nlink,
               S_ISDIR(st.st_mode) ? 0 : (long long)st.st_size);
}

static void content_of(const char *what, const char *path)
{
    char text[100] = "";
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (n < 0)
        said(what, n);
    else
        printf("%s: '%s'\n", what, text);
    close(fd);
}

/* Calls a function as another user, in another process. */
static void as(uid_t uid, gid_t gid, void (*what)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid))
            printf("cannot become user %d\n", uid);
        what();
        fflush(stdout);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void opening(void)
{
    made("file", 0644, "hello");
    mode_of("a new file", "file");
    said("open what is not there", open("missing", O_RDONLY));
    said("make what is there, exclusively", open("file", O_RDWR | O_CREAT | O_EXCL, 0600));
    said("make what is there", open("file", O_RDWR | O_CREAT, 0600));
    content_of("what was there", "file");
    said("open a file as a directory", open("file", O_RDONLY | O_DIRECTORY));
    said("open below a file", open("file/below", O_RDONLY));
    said("open and empty", open("file", O_WRONLY | O_TRUNC));
    mode_of("the emptied file", "file");
    mkdir("dir", 0755);
    said("open a directory for writing", open("dir", O_RDWR));
    said("open a directory", open("dir", O_RDONLY));
    said("make a directory's name", open("dir", O_RDWR | O_CREAT, 0600));
    int fd = open("file", O_WRONLY | O_APPEND);
    count("append", write(fd, "one", 3));
    int other = open("file", O_WRONLY | O_APPEND);
    count("append elsewhere", write(other, "two", 3));
    count("append again", write(fd, "three", 5));
    content_of("appended", "file");
    count("read what is open for writing", read(fd, &other, 1));
    fd = open("file", O_RDONLY);
    count("write what is open for reading", write(fd, "x", 1));
    count("read at the end", pread(fd, &other, 4, 11));
    count("read past the end", pread(fd, &other, 4, 1000));
    said("truncate what is open for reading", ftruncate(fd, 3));
    umask(027);
    said("make under a umask", open("masked", O_RDWR | O_CREAT, 0777));
    mode_of("masked", "masked");
    said("mkdir under a umask", mkdir("masked-dir", 0777));
    mode_of("masked directory", "masked-dir");
    umask(0);
    said("make without a umask", open("unmasked", O_RDWR | O_CREAT, 0666));
    mode_of("unmasked", "unmasked");
    said("mkdir without a umask", mkdir("unmasked-dir", 01777));
    mode_of("unmasked directory", "unmasked-dir");
    umask(022);
    char name[300];
    memset(name, 'n', sizeof name);
    name[255] = 0;
    said("a name of 255", open(name, O_RDWR | O_CREAT, 0600));
    said("remove it", unlink(name));
    name[255] = 'n';
    name[256] = 0;
    said("a name of 256", open(name, O_RDWR | O_CREAT, 0600));
    said("unlink a name of 256", unlink(name));
    said("a name of bytes", open("\x01\xff *?\n", O_RDWR | O_CREAT, 0600));
    said("unlink it", unlink("\x01\xff *?\n"));
    said("the empty name", open("", O_RDWR | O_CREAT, 0600));
    fd = open("readonly", O_RDWR | O_CREAT | O_EXCL, 0400);
    count("write what was made read-only", write(fd, "x", 1));
    mode_of("made read-only", "readonly");
    fd = open(".", O_RDWR | O_TMPFILE, 0600);
    if (fd >= 0 || errno == EOPNOTSUPP)
        printf("a file without a name: ok, or not known\n");
    else
        said("a file without a name", -1);
}

static void unlinked(void)
{
    struct stat st;
    int fd = make("gone", 0640, "still here");
    said("unlink while open", unlink("gone"));
    said("stat the name", stat("gone", &st));
    said("fstat", fstat(fd, &st));
    number("links", st.st_nlink);
    number("size", st.st_size);
    count("write on", pwrite(fd, "!", 1, 10));
    said("fchmod", fchmod(fd, 0600));
    said("ftruncate", ftruncate(fd, 20));
    fstat(fd, &st);
    printf("afterwards: %o %lld\n", st.st_mode, (long long)st.st_size);
    char text[21] = "";
    count("read it", pread(fd, text, 20, 0));
    printf("text: '%s'\n", text);
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDWR);
    said("open it again", again);
    count("through that", pread(again, text, 20, 0));
    made("gone", 0600, "another");
    content_of("the name again", "gone");
    pread(fd, text, 20, 0);
    printf("the old one: '%s'\n", text);
    said("unlink a directory", unlink("dir"));
    said("unlink what is not there", unlink("missing"));
    mkdir("dead", 0755);
    int dir = open("dead", O_RDONLY | O_DIRECTORY);
    said("rmdir while open", rmdir("dead"));
    said("fstat the directory", fstat(dir, &st));
    said("make a file in it", openat(dir, "file", O_RDWR | O_CREAT, 0600));
    /* A file that a rename replaced remains usable where it is open. */
    fd = make("over", 0600, "below");
    made("under", 0600, "above");
    said("rename over an open file", rename("under", "over"));
    memset(text, 0, sizeof text);
    pread(fd, text, 20, 0);
    printf("the open one: '%s'\n", text);
    content_of("the name", "over");
}

static int rename2(const char *from, const char *to, unsigned flags)
{
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags);
}

static void renaming(void)
{
    made("a", 0600, "a");
    made("b", 0600, "b");
    mkdir("d1", 0755);
    mkdir("d2", 0755);
    made("d2/inside", 0600, "inside");
    said("rename to a new name", rename("a", "c"));
    content_of("there", "c");
    content_of("not here", "a");
    said("rename over a file", rename("c", "b"));
    content_of("replaced", "b");
    said("rename what is not there", rename("missing", "b"));
    said("a file over a directory", rename("b", "d1"));
    said("a directory over a file", rename("d1", "b"));
    said("a directory over a full one", rename("d1", "d2"));
    said("a directory over an empty one", rename("d2", "d1"));
    content_of("in the moved directory", "d1/inside");
    said("a directory into itself", rename("d1", "d1/below"));
    mkdir("d2", 0755);
    said("a file into a directory", rename("b", "d2/b"));
    said("a directory into another", rename("d1", "d2/d1"));
    content_of("down there", "d2/d1/inside");
    made("a", 0600, "a");
    made("b", 0600, "b");
    said("no replacing, free", rename2("a", "free", RENAME_NOREPLACE));
    said("no replacing, taken", rename2("free", "b", RENAME_NOREPLACE));
    said("exchange", rename2("free", "b", RENAME_EXCHANGE));
    content_of("exchanged", "free");
    content_of("the other", "b");
    said("exchange with a directory", rename2("b", "d2", RENAME_EXCHANGE));
    content_of("a file now", "d2");
    content_of("in what is a directory now", "b/d1/inside");
    said("exchange with nothing", rename2("b", "missing", RENAME_EXCHANGE));
    said("both", rename2("b", "d2", RENAME_EXCHANGE | RENAME_NOREPLACE));
    said("the same file", rename("b", "b"));
    int fd = open("free", O_RDONLY);
    rename("free", "elsewhere");
    char c = 0;
    count("read what was renamed", pread(fd, &c, 1, 0));
    said("rename the working directory's parent", mkdir("w", 0755) ?: mkdir("w/x", 0755) ?: chdir("w/x") ?:
         rename("../../w", "../../v"));
    said("open here", open("here", O_RDWR | O_CREAT, 0600));
    chdir("../..");
    mode_of("there it is", "v/x/here");
}

static void links(void)
{
    made("one", 0600, "content");
    said("link", link("one", "two"));
    mode_of("one", "one");
    said("link to what is there", link("one", "two"));
    said("link what is not there", link("missing", "three"));
    said("link a directory", link("b", "three"));
    int fd = open("two", O_WRONLY);
    count("write the other", pwrite(fd, "CON", 3, 0));
    content_of("read the one", "one");
    struct stat a, b;
    stat("one", &a);
    stat("two", &b);
    printf("the same file: %s\n", a.st_ino == b.st_ino && a.st_dev == b.st_dev ? "yes" : "no");
    unlink("one");
    mode_of("two", "two");
    said("link into a directory", mkdir("ldir", 0755) ?: link("two", "ldir/three"));
    said("symlink", symlink("two", "sym"));
    mode_of("the symbolic link", "sym");
    content_of("through it", "sym");
    char text[PATH_MAX + 1] = "";
    count("readlink", readlink("sym", text, PATH_MAX));
    printf("leads to: '%s'\n", text);
    said("symlink over a name", symlink("two", "sym"));
    said("link a symbolic link", link("sym", "sym2"));
    memset(text, 0, sizeof text);
    readlink("sym2", text, PATH_MAX);
    printf("it too: '%s'\n", text);
    said("follow it to link", linkat(AT_FDCWD, "sym", AT_FDCWD, "followed", AT_SYMLINK_FOLLOW));
    mode_of("followed", "followed");
    said("readlink a file", readlink("two", text, PATH_MAX));
    symlink("missing", "dangling");
    said("open a dangling one", open("dangling", O_RDONLY));
    said("do not follow", open("sym", O_RDONLY | O_NOFOLLOW));
    said("exclusively through it", open("dangling", O_RDWR | O_CREAT | O_EXCL, 0600));
    said("make through it", open("dangling", O_RDWR | O_CREAT, 0600));
    mode_of("made", "missing");
    unlink("missing");
    symlink("loop2", "loop1");
    symlink("loop1", "loop2");
    said("a loop", open("loop1", O_RDONLY));
    memset(text, 't', PATH_MAX);
    text[PATH_MAX - 1] = 0;
    said("a long target", symlink(text, "long"));
    char back[PATH_MAX] = "";
    count("its length", readlink("long", back, PATH_MAX));
    printf("the same: %s\n", memcmp(text, back, PATH_MAX - 1) ? "no" : "yes");
    said("the empty target", symlink("", "empty"));
    unlink("long");
}

static void directories(void)
{
    said("mkdir", mkdir("sub", 0750));
    mode_of("sub", "sub");
    said("mkdir again", mkdir("sub", 0750));
    said("mkdir below nothing", mkdir("nothing/sub", 0750));
    made("sub/file", 0600, "");
    said("rmdir a full one", rmdir("sub"));
    said("rmdir a file", rmdir("sub/file"));
    said("rmdir .", rmdir("sub/."));
    unlink("sub/file");
    said("rmdir", rmdir("sub"));
    said("rmdir again", rmdir("sub"));
    struct stat st;
    mkdir("parent", 0755);
    mkdir("parent/x", 0755);
    said("stat ..", stat("parent/x/..", &st));
    /* Deep enough to exceed the longest possible path. */
    int here = open(".", O_RDONLY), depth = 0;
    while (depth < 50 && !mkdir("deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper", 0755) &&
           !chdir("deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper"))
        depth++;
    number("depth", depth);
    while (depth-- > 0)
        if (chdir("..") || rmdir("deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper-and-deeper")) {
            said("back up", -1);
            break;
        }
    fchdir(here);
}

/* MANY entries (300), created unless they exist, half of which are removed while they are read. */
static void many(void)
{
    static char seen[100000];
    int N = atoi(getenv("MANY") ?: "300");
    char name[300];
    int n = 0, doubles = 0, unknown = 0, removed = 0;
    int there = mkdir("many", 0755);
    chdir("many");
    for (int i = 0; i < N && !there; i++) {
        snprintf(name, sizeof name, "entry-with-a-name-%d", i);
        int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
        if (fd < 0) {
            said(name, fd);
            break;
        }
        close(fd);
    }
    DIR *dir = opendir(".");
    struct dirent *entry;
    long middle = 0;
    while ((entry = readdir(dir))) {
        int i;
        if (sscanf(entry->d_name, "entry-with-a-name-%d", &i) != 1 || i < 0 || i >= N) {
            unknown++;
            continue;
        }
        doubles += seen[i]++;
        if (++n == N / 3)
            middle = telldir(dir);
        if (i % 2 && !unlink(entry->d_name))
            removed++;
    }
    printf("entries %d, doubles %d, others %d, removed %d\n", n, doubles, unknown, removed);
    rewinddir(dir);
    for (n = 0; (entry = readdir(dir));)
        n += entry->d_name[0] != '.';
    number("left", n);
    seekdir(dir, middle);
    for (n = 0; (entry = readdir(dir));)
        n++;
    printf("behind the middle: %s\n", n > 0 && n < N ? "some" : "none or all");
    rewinddir(dir);
    int kinds = 0;
    while ((entry = readdir(dir)))
        kinds += entry->d_type == (entry->d_name[0] == '.' ? DT_DIR : DT_REG);
    number("of the right type", kinds);
    rewinddir(dir);
    while ((entry = readdir(dir)))
        if (entry->d_name[0] != '.' && unlink(entry->d_name))
            said(entry->d_name, -1);
    closedir(dir);
    chdir("..");
    said("remove the rest", rmdir("many"));
}

static void attributes(void)
{
    struct stat st;
    made("attr", 0644, "0123456789");
    said("chmod", chmod("attr", 0751));
    mode_of("changed", "attr");
    said("truncate", truncate("attr", 4));
    content_of("shorter", "attr");
    said("truncate longer", truncate("attr", 8));
    mode_of("longer", "attr");
    said("truncate a directory", truncate("parent", 0));
    said("truncate to less than nothing", truncate("attr", -1));
    struct timespec times[2] = { { 1000000000, 123456789 }, { 1500000000, 987654321 } };
    said("utimensat", utimensat(AT_FDCWD, "attr", times, 0));
    stat("attr", &st);
    printf("times: %lld.%09ld %lld.%09ld\n", (long long)st.st_atim.tv_sec, st.st_atim.tv_nsec,
           (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    times[0].tv_nsec = UTIME_OMIT;
    times[1].tv_sec = 1600000000;
    utimensat(AT_FDCWD, "attr", times, 0);
    stat("attr", &st);
    printf("one of them: %lld %lld\n", (long long)st.st_atim.tv_sec, (long long)st.st_mtim.tv_sec);
    times[1].tv_nsec = UTIME_NOW;
    utimensat(AT_FDCWD, "attr", times, 0);
    stat("attr", &st);
    printf("now: %s\n", st.st_mtim.tv_sec > 1600000000 ? "yes" : "no");
    times[0] = times[1] = (struct timespec){ 1200000000, 5 };
    symlink("attr", "attr-link");
    said("times of a symbolic link", utimensat(AT_FDCWD, "attr-link", times, AT_SYMLINK_NOFOLLOW));
    lstat("attr-link", &st);
    printf("its time: %lld\n", (long long)st.st_mtim.tv_sec);
    times[0] = times[1] = (struct timespec){ -1000, 0 };
    said("before 1970", utimensat(AT_FDCWD, "attr", times, 0));
    stat("attr", &st);
    printf("its time: %lld\n", (long long)st.st_mtim.tv_sec);
    /* Changes of contents change the time. */
    int fd = open("attr", O_RDWR);
    write(fd, "x", 1);
    close(fd);
    stat("attr", &st);
    printf("written now: %s\n", st.st_mtim.tv_sec > 1600000000 ? "yes" : "no");
    struct statvfs fs;
    said("statvfs", statvfs(".", &fs));
    printf("names of %lu, blocks: %s\n", fs.f_namemax, fs.f_blocks > 0 && fs.f_bfree > 0 ? "some" : "none");
    said("access for reading", access("attr", R_OK));
    said("access to nothing", access("missing", F_OK));
}

static void extended(void)
{
    char value[70000] = "", names[1000] = "";
    made("x", 0644, "");
    count("no attributes", listxattr("x", names, sizeof names));
    said("setxattr", setxattr("x", "user.one", "first", 5, 0));
    count("its length", getxattr("x", "user.one", NULL, 0));
    count("getxattr", getxattr("x", "user.one", value, 100));
    printf("value: '%s'\n", value);
    said("no room", getxattr("x", "user.one", value, 2));
    said("make, taken", setxattr("x", "user.one", "2", 1, XATTR_CREATE));
    said("replace, missing", setxattr("x", "user.two", "2", 1, XATTR_REPLACE));
    said("replace", setxattr("x", "user.one", "2", 1, XATTR_REPLACE));
    count("shorter", getxattr("x", "user.one", value, 100));
    said("an empty one", setxattr("x", "user.nothing", "", 0, 0));
    count("of length", getxattr("x", "user.nothing", value, 100));
    count("names", listxattr("x", names, sizeof names));
    count("names without room", listxattr("x", NULL, 0));
    said("names, too little room", listxattr("x", names, 3));
    said("removexattr", removexattr("x", "user.one"));
    said("again", removexattr("x", "user.one"));
    said("get it", getxattr("x", "user.one", value, 100));
    memset(value, 'v', sizeof value);
    said("2000 bytes", setxattr("x", "user.long", value, 2000, 0));
    memset(value, 0, sizeof value);
    count("back", getxattr("x", "user.long", value, sizeof value));
    said("70000 bytes", setxattr("x", "user.long", value, 70000, 0));
    int fd = open("x", O_RDONLY);
    said("fsetxattr", fsetxattr(fd, "user.f", "f", 1, 0));
    count("fgetxattr", fgetxattr(fd, "user.f", value, 100));
    said("on a directory", setxattr("parent", "user.dir", "d", 1, 0));
    symlink("x", "x-link");
    said("on a symbolic link", lsetxattr("x-link", "user.link", "l", 1, 0));
    if (root)
        said("trusted", setxattr("x", "trusted.t", "t", 1, 0));
    said("an unknown kind", setxattr("x", "other.o", "o", 1, 0));
}

/* An access control list as the kernel keeps it in an extended attribute: owner, user 1000, group, mask, others. */
struct acl {
    unsigned version;
    struct { unsigned short tag, permissions; unsigned id; } entries[5];
};

static struct acl acl(unsigned short user, unsigned short mask)
{
    return (struct acl){ 2, { { 1, 7, -1 }, { 2, user, 1000 }, { 4, 5, -1 }, { 16, mask, -1 }, { 32, 0, -1 } } };
}

static void lists(void)
{
    struct acl list = acl(7, 7), other;
    char names[1000] = "";
    made("listed", 0644, "x");
    said("set a list", setxattr("listed", "system.posix_acl_access", &list, sizeof list, 0));
    mode_of("the group's bits are the mask", "listed");
    count("get a list", getxattr("listed", "system.posix_acl_access", &other, sizeof other));
    number("it is the same", !memcmp(&list, &other, sizeof list));
    count("names", listxattr("listed", names, sizeof names));
    printf("its name: %s\n", names);
    said("chmod changes the mask", chmod("listed", 0700));
    count("get it again", getxattr("listed", "system.posix_acl_access", &other, sizeof other));
    number("the mask", other.entries[3].permissions);
    said("a default is for directories", setxattr("listed", "system.posix_acl_default", &list, sizeof list, 0));
    said("remove a list", removexattr("listed", "system.posix_acl_access"));
    count("it is gone", getxattr("listed", "system.posix_acl_access", &other, sizeof other));
    list.version = 3;
    said("a list of another version", setxattr("listed", "system.posix_acl_access", &list, sizeof list, 0));
    mkdir("lists", 0777);
    list = acl(6, 7);
    said("set a default", setxattr("lists", "system.posix_acl_default", &list, sizeof list, 0));
    made("lists/file", 0666, "");
    mkdir("lists/dir", 0777);
    mknod("lists/fifo", S_IFIFO | 0666, 0);
    symlink("file", "lists/link");
    mode_of("a new file by the default", "lists/file");
    mode_of("a new directory", "lists/dir");
    mode_of("a new FIFO", "lists/fifo");
    mode_of("a new link", "lists/link");
    count("a file inherits", getxattr("lists/file", "system.posix_acl_access", &other, sizeof other));
    number("its mask", other.entries[3].permissions);
    count("a directory inherits", getxattr("lists/dir", "system.posix_acl_default", &other, sizeof other));
    umask(077);
    made("lists/masked", 0666, "");
    made("unlisted", 0666, "");
    umask(022);
    mode_of("no umask there", "lists/masked");
    mode_of("but elsewhere", "unlisted");
}

static void user_by_list(void)
{
    said("a user who is listed may read", open("for-user", O_RDONLY));
    said("and not write", open("for-user", O_WRONLY));
    said("another's file", open("not-for-user", O_RDONLY));
}

/* Access control lists are obeyed. Only root can set this up. */
static void obeyed(void)
{
    struct acl list = acl(4, 7);
    made("for-user", 0600, "");
    made("not-for-user", 0600, "");
    said("list a user", setxattr("for-user", "system.posix_acl_access", &list, sizeof list, 0));
    as(1000, 1001, user_by_list);
    made("sgid", 0755, "");
    chown("sgid", 1000, 1);
    chmod("sgid", 02755);
    list = acl(4, 5);
    said("set a list on what is set-group-id", setxattr("sgid", "system.posix_acl_access", &list, sizeof list, 0));
    mode_of("root leaves the bit", "sgid");
}

/* Files without a name. FUSE supports them since Linux 6.2, so this part runs only when it is requested. */
static void nameless(void)
{
    char path[64], content[16] = "";
    int fd = said("make a file without a name", open(".", O_TMPFILE | O_RDWR, 0666));
    struct stat st;
    fstat(fd, &st);
    number("links", st.st_nlink);
    number("mode", st.st_mode & 07777);
    count("write", write(fd, "content", 7));
    count("read", pread(fd, content, sizeof content, 0));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    said("name it", linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    content_of("by its name", "named");
    fstat(fd, &st);
    number("links", st.st_nlink);
    fd = said("make one that stays without", open(".", O_TMPFILE | O_EXCL | O_RDWR, 0600));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    said("name it", linkat(AT_FDCWD, path, AT_FDCWD, "unnamed", AT_SYMLINK_FOLLOW));
    said("for reading only", open(".", O_TMPFILE | O_RDONLY, 0600));
    said("in what is not a directory", open("named", O_TMPFILE | O_RDWR, 0600));
}

/* Birth times of files. FUSE supports them since Linux 6.6, so this part runs only when it is requested. */
static void birth(void)
{
    struct statx file, later;
    made("born", 0644, "x");
    said("statx", statx(AT_FDCWD, "born", 0, STATX_BTIME | STATX_BASIC_STATS, &file));
    number("the time of birth is known", !!(file.stx_mask & STATX_BTIME));
    number("and not after the last change", file.stx_btime.tv_sec <= file.stx_ctime.tv_sec);
    sleep(2);
    made("born", 0644, "y");
    statx(AT_FDCWD, "born", 0, STATX_BTIME | STATX_BASIC_STATS, &later);
    number("it stays", later.stx_btime.tv_sec == file.stx_btime.tv_sec && later.stx_btime.tv_nsec == file.stx_btime.tv_nsec);
    number("while it changes", later.stx_mtime.tv_sec > file.stx_mtime.tv_sec);
}

static void data(void)
{
    static char block[1 << 16], back[1 << 16];
    struct stat st;
    for (unsigned i = 0; i < sizeof block; i++)
        block[i] = i * 7 + (i >> 8);
    int fd = open("data", O_RDWR | O_CREAT, 0600), bad = 0;
    for (int i = 0; i < 40; i++)
        bad += write(fd, block, sizeof block) != sizeof block;
    number("short writes", bad);
    said("fsync", fsync(fd));
    said("fdatasync", fdatasync(fd));
    for (int i = 0; i < 40; i++)
        bad += pread(fd, back, sizeof back, (off_t)i * sizeof back) != sizeof back || memcmp(block, back, sizeof back);
    number("wrong blocks", bad);
    count("odd piece", pread(fd, back, 5001, 65533));
    printf("equal: %d\n", !memcmp(back, block + 65533, 3) && !memcmp(back + 3, block, 4998));
    count("odd write", pwrite(fd, block + 1, 4099, 131071));
    pread(fd, back, 4099, 131071);
    printf("equal: %d\n", !memcmp(back, block + 1, 4099));
    /* Holes. */
    int hole = open("hole", O_RDWR | O_CREAT, 0600);
    pwrite(hole, "begin", 5, 0);
    pwrite(hole, "end", 3, 1 << 20);
    fsync(hole);
    number("size with a hole", lseek(hole, 0, SEEK_END));
    number("the hole", lseek(hole, 0, SEEK_HOLE));
    number("data past it", lseek(hole, 8192, SEEK_DATA));
    number("the last hole", lseek(hole, 1 << 20, SEEK_HOLE));
    count("beyond", lseek(hole, 1 << 21, SEEK_DATA));
    pread(hole, back, 4096, 70000);
    bad = 0;
    for (int i = 0; i < 4096; i++)
        bad += back[i] != 0;
    number("not zero in the hole", bad);
    fstat(hole, &st);
    printf("sparse: %s\n", st.st_blocks < 200 ? "yes" : "no");
    said("punch", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 65536, 65536));
    pread(fd, back, sizeof back, 65536);
    bad = 0;
    for (unsigned i = 0; i < sizeof back; i++)
        bad += back[i] != 0;
    number("not zero where punched", bad);
    said("zero", fallocate(fd, FALLOC_FL_ZERO_RANGE, 10, 100));
    said("allocate", fallocate(fd, 0, 0, 3000000));
    fstat(fd, &st);
    number("size", st.st_size);
    said("allocate, same size", fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 4000000));
    fstat(fd, &st);
    number("size", st.st_size);
    said("allocate nothing", fallocate(fd, 0, 0, 0));
    /* Copies. */
    int copy = open("copy", O_RDWR | O_CREAT, 0600);
    off_t from = 131072, to = 5;
    count("copy_file_range", copy_file_range(fd, &from, copy, &to, 100000, 0));
    printf("positions: %lld %lld\n", (long long)from, (long long)to);
    pread(copy, back, 50000, 5);
    static char again[50000];
    pread(fd, again, 50000, 131072);
    printf("equal: %d\n", !memcmp(back, again, 50000));
    from = to = 0;
    count("copy onto itself", copy_file_range(fd, &from, fd, &to, 100, 0));
    /* Far past the end. */
    count("write far out", pwrite(hole, "far", 3, 1LL << 40));
    fstat(hole, &st);
    number("size", st.st_size);
    said("truncate it", ftruncate(hole, 0));
    count("write at the end of numbers", pwrite(hole, "x", 1, LLONG_MAX));
    close(fd);
    close(copy);
    close(hole);
}

static void mapping(void)
{
    int fd = open("map", O_RDWR | O_CREAT, 0600);
    ftruncate(fd, 1 << 20);
    char *map = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    said("mmap", map == MAP_FAILED ? -1 : 0);
    if (map == MAP_FAILED)
        return;
    for (int i = 0; i < 1 << 20; i += 4096)
        memcpy(map + i, &i, sizeof i);
    said("msync", msync(map, 1 << 20, MS_SYNC));
    int other = open("map", O_RDONLY), value = 0, bad = 0;
    for (int i = 0; i < 1 << 20; i += 4096) {
        pread(other, &value, sizeof value, i);
        bad += value != i;
    }
    number("wrong in the file", bad);
    value = 4711;
    count("write", pwrite(fd, &value, sizeof value, 8192));
    printf("in the map: %d\n", *(int *)(map + 8192));
    close(fd);
    map[5] = 'z';
    munmap(map, 1 << 20);
    char c = 0;
    pread(other, &c, 1, 5);
    printf("after munmap: '%c'\n", c);
    close(other);
    /* Mapped through a descriptor that appends. */
    fd = open("map", O_RDWR | O_APPEND);
    map = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    memcpy(map + 100, "mapped", 6);
    msync(map, 4096, MS_SYNC);
    munmap(map, 1 << 20);
    close(fd);
    struct stat st;
    stat("map", &st);
    number("size", st.st_size);
    char text[7] = "";
    fd = open("map", O_RDONLY);
    pread(fd, text, 6, 100);
    printf("where it belongs: '%s'\n", text);
    map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    map[100] = 'M';
    pread(fd, text, 6, 100);
    printf("private: '%s' '%c'\n", text, map[100]);
    munmap(map, 4096);
    close(fd);
}

/* In the child, while the parent has locks. */
static void locked(int *ready, int *tried)
{
    char c;
    read(ready[0], &c, 1);
    int fd = open("lock", O_RDWR);
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 15, .l_len = 10 };
    said("lock what is locked", fcntl(fd, F_SETLK, &lock));
    said("ask", fcntl(fd, F_GETLK, &lock));
    printf("who: type %d start %lld len %lld parent %d\n", lock.l_type, (long long)lock.l_start, (long long)lock.l_len,
           lock.l_pid == getppid());
    lock = (struct flock){ .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 20, .l_len = 10 };
    said("lock beside it", fcntl(fd, F_SETLK, &lock));
    int other = open("flock", O_RDWR);
    said("flock what is locked", flock(other, LOCK_EX | LOCK_NB));
    said("flock shared", flock(other, LOCK_SH | LOCK_NB));
    lock = (struct flock){ .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 20 };
    write(tried[1], "x", 1);
    alarm(100);
    said("wait for it", fcntl(fd, F_SETLKW, &lock));
    said("wait for the other", flock(other, LOCK_EX));
    fflush(stdout);
    _exit(0);
}

static void locking(void)
{
    int ready[2], tried[2];
    char c;
    pipe(ready);
    pipe(tried);
    int fd = make("lock", 0600, "0123456789"), other = make("flock", 0600, "");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        locked(ready, tried);
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 10 };
    fcntl(fd, F_SETLK, &lock);
    flock(other, LOCK_EX);
    write(ready[1], "x", 1);
    read(tried[0], &c, 1);
    lock.l_type = F_UNLCK;
    fcntl(fd, F_SETLK, &lock);
    flock(other, LOCK_UN);
    waitpid(child, NULL, 0);
    lock = (struct flock){ .l_type = F_WRLCK, .l_whence = SEEK_SET };
    said("after its end", fcntl(fd, F_SETLK, &lock));
    said("open file description lock", fcntl(open("lock", O_RDWR), F_OFD_SETLK, &(struct flock){ .l_type = F_RDLCK }));
    said("lease", fcntl(open("flock", O_RDONLY), F_SETLEASE, F_UNLCK));
}

static void special(void)
{
    said("mkfifo", mkfifo("fifo", 0640));
    mode_of("fifo", "fifo");
    said("open it", open("fifo", O_WRONLY | O_NONBLOCK));
    int fd = open("fifo", O_RDWR | O_NONBLOCK);
    count("write", write(fd, "through", 7));
    char text[8] = "";
    count("read", read(fd, text, 7));
    struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "socket" };
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    said("bind", bind(listener, (struct sockaddr *)&address, sizeof address));
    said("listen", listen(listener, 1));
    said("connect", connect(client, (struct sockaddr *)&address, sizeof address));
    struct stat st;
    stat("socket", &st);
    printf("a socket: %d\n", S_ISSOCK(st.st_mode));
    said("open a socket", open("socket", O_RDONLY));
    said("mknod a file", mknod("node", S_IFREG | 0604, 0));
    mode_of("node", "node");
    if (root) {
        said("whiteout", mknod("whiteout", S_IFCHR, makedev(0, 0)));
        mode_of("whiteout", "whiteout");
    }
}

static void by_user(void)
{
    said("read what one may not", open("secret", O_RDONLY));
    said("make where one may not", open("closed/file", O_RDWR | O_CREAT, 0600));
    said("look where one may not", open("closed/inside", O_RDONLY));
    said("make", open("public/mine", O_RDWR | O_CREAT, 0640));
    mode_of("mine", "public/mine");
    said("mkdir", mkdir("public/my-dir", 0750));
    mode_of("my directory", "public/my-dir");
    said("symlink", symlink("target", "public/my-link"));
    mode_of("my link", "public/my-link");
    said("mkfifo", mkfifo("public/my-fifo", 0600));
    mode_of("my fifo", "public/my-fifo");
    said("chmod mine", chmod("public/mine", 0644));
    said("chmod another's", chmod("secret", 0644));
    said("chown mine", chown("public/mine", 0, -1));
    said("chown to myself", chown("public/mine", getuid(), getgid()));
    said("remove another's where sticky", unlink("public/roots"));
    said("rename another's where sticky", rename("public/roots", "public/moved"));
    said("remove mine where sticky", unlink("public/mine"));
    said("in a set-group-id directory", open("sgid/file", O_RDWR | O_CREAT, 0640));
    mode_of("its group", "sgid/file");
    said("a directory there", mkdir("sgid/dir", 0750));
    mode_of("its group", "sgid/dir");
    said("what is for my group", open("for-group", O_RDONLY));
    said("times of another's, now", utimensat(AT_FDCWD, "writable", NULL, 0));
    struct timespec times[2] = { { 1, 0 }, { 1, 0 } };
    said("times of another's", utimensat(AT_FDCWD, "writable", times, 0));
    int fd = open("suid", O_WRONLY);
    count("write to what is set-user-id", write(fd, "x", 1));
    mode_of("afterwards", "suid");
    said("truncate what is set-group-id", truncate("sgid-file", 1));
    mode_of("afterwards", "sgid-file");
    said("open and empty it", open("suid2", O_WRONLY | O_TRUNC));
    mode_of("afterwards", "suid2");
    said("trusted attributes", setxattr("writable", "trusted.x", "x", 1, 0));
    said("user attributes", setxattr("writable", "user.x", "x", 1, 0));
    said("user attributes of what one cannot write", setxattr("readable", "user.x", "x", 1, 0));
}

static void owners(void)
{
    mkdir("public", 01777);
    chmod("public", 01777);
    mkdir("closed", 0700);
    made("closed/inside", 0644, "");
    made("secret", 0600, "secret");
    made("public/roots", 0644, "");
    mkdir("sgid", 0755);
    chown("sgid", 1000, 77);
    chmod("sgid", 02777);
    made("for-group", 0640, "");
    chown("for-group", 0, 1001);
    made("writable", 0666, "");
    chmod("writable", 0666);
    made("readable", 0644, "");
    const char *suid[] = { "suid", "sgid-file", "suid2" };
    for (int i = 0; i < 3; i++) {
        made(suid[i], 0777, "#!/bin/true\n");
        chmod(suid[i], 06777);
    }
    mode_of("set-user-id", "suid");
    as(1000, 1001, by_user);
    made("owned", 0644, "");
    said("chown", chown("owned", 1234, 4321));
    mode_of("owned", "owned");
    said("chown the group", chown("owned", -1, 7));
    mode_of("owned", "owned");
    chmod("owned", 06755);
    said("chown what is set-user-id", chown("owned", 1235, -1));
    mode_of("owned", "owned");
    symlink("owned", "owned-link");
    said("lchown", lchown("owned-link", 5, 6));
    mode_of("the link", "owned-link");
    mode_of("not what it leads to", "owned");
    chmod("suid", 04777);
    int fd = open("suid", O_WRONLY);
    count("root writes to what is set-user-id", write(fd, "x", 1));
    mode_of("afterwards", "suid");
    said("root reads what nobody may", chmod("secret", 0) ?: open("secret", O_RDWR));
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); int root, only_by_name; } parts[] = {
        { "opening", opening, 0 }, { "unlinked", unlinked, 0 }, { "renaming", renaming, 0 }, { "links", links, 0 },
        { "directories", directories, 0 }, { "attributes", attributes, 0 }, { "extended", extended, 0 },
        { "data", data, 0 }, { "mapping", mapping, 0 }, { "locking", locking, 0 }, { "special", special, 0 },
        { "lists", lists, 0 }, { "owners", owners, 1 }, { "obeyed", obeyed, 1 }, { "many", many, 0 },
        { "nameless", nameless, 0, 1 }, { "birth", birth, 0, 1 },
    };
    signal(SIGPIPE, SIG_IGN);
    umask(022);
    root = argc < 3 || strcmp(argv[2], "user");
    if (argc < 2 || chdir(argv[1])) {
        perror("fs-check");
        return 1;
    }
    for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (root && argc > 2 ? strcmp(parts[i].name, argv[2]) : parts[i].only_by_name || (parts[i].root && !root))
            continue;
        printf("== %s\n", parts[i].name);
        fflush(stdout);
        parts[i].run();
        fflush(stdout);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        /* The next part must not inherit open files. */
        for (int fd = 3; fd < 200; fd++)
            close(fd);
    }
    printf("== end\n");
    return 0;
}
