//! Hints for errors that look like a missing permission or an old kernel but come from a container's seccomp profile:
//! older profiles refuse every system call that they do not know (clone3, which starts threads; statx) with EPERM, and
//! no library falls back to an older call on EPERM.

/// Hint added to an error that a seccomp filter may have caused.
const HINT: &str = "; this process runs under a seccomp filter, probably its container's, and older profiles refuse \
                    newer system calls (clone3, statx) in this way: update the container engine (Docker 20.10.10, \
                    libseccomp 2.5), or start the container with --security-opt seccomp=unconfined";

/// Returns the hint to append to an error's text, or an empty string.
pub(super) fn hint(text: &str) -> &'static str {
    let status = || std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if is_refusal(text) && is_filtered(&status()) { HINT } else { "" }
}

/// Returns whether the text contains an OS error that a seccomp filter returns.
fn is_refusal(text: &str) -> bool {
    [libc::EPERM, libc::ENOSYS].iter().any(|errno| text.contains(&format!("(os error {errno})")))
}

/// Returns whether a process with this `/proc/PID/status` has a seccomp filter (proc(5): mode 2).
fn is_filtered(status: &str) -> bool {
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::chain;
    use crate::machine;

    #[test]
    fn refusals_are_known_by_their_number() {
        let failed = |errno| machine::Error::Host("a vCPU thread", std::io::Error::from_raw_os_error(errno));
        assert!(is_refusal(&chain(&failed(libc::EPERM))) && is_refusal(&chain(&failed(libc::ENOSYS))));
        assert!(!is_refusal(&chain(&failed(libc::EAGAIN))) && !is_refusal("the guest's os error 1"));
    }

    #[test]
    fn filters_are_seen_in_the_process_status() {
        assert!(is_filtered("NoNewPrivs:\t0\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!is_filtered("Seccomp:\t0\nSeccomp_filters:\t0\n") && !is_filtered("Seccomp_filters:\t2\n"));
    }
}
