//! Environment of a command that runs under `vireo exec`.
//!
//! If the guest's root is the host's, the command inherits vireo's environment, so that test runners (cargo, go,
//! pytest) and scripts work in the guest as on the host. Left out are variables that mean nothing in another machine
//! (sockets of a desktop session, descriptors of make's job server) and variables that name a secret: the guest's
//! memory, which holds the environment, may end up in a core file. With any other root the command gets only the
//! language and the time zone. `--env` adds any other variable.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// Names that are left out: those of sessions, sockets and descriptors that do not exist in the guest, and those for
/// which the command has its own values there.
const LEFT_OUT: [&str; 33] = [
    "_",
    "CARGO_MAKEFLAGS",
    "DBUS_SESSION_BUS_ADDRESS",
    "DBUS_SYSTEM_BUS_ADDRESS",
    "DISPLAY",
    "FAKEROOTKEY",
    "GPG_AGENT_INFO",
    "HOME",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "MAKEFLAGS",
    "MANAGERPID",
    "MFLAGS",
    "NOTIFY_SOCKET",
    "OLDPWD",
    "PWD",
    "SESSION_MANAGER",
    "SHLVL",
    "STY",
    "SYSTEMD_EXEC_PID",
    "TERM",
    "TMUX",
    "TMUX_PANE",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "WAYLAND_DISPLAY",
    "WINDOWID",
    "XAUTHORITY",
    "XDG_RUNTIME_DIR",
    "XDG_VTNR",
];
/// Prefixes of names that are left out for the same reasons.
const LEFT_OUT_BEGINNINGS: [&str; 5] = ["BASH_FUNC_", "SSH_", "SUDO_", "XDG_SEAT", "XDG_SESSION"];
/// Parts of names that indicate secrets.
const SECRETS: [&str; 8] =
    ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "PRIVATE_KEY", "API_KEY"];
/// Names that mean the same with any root, in addition to those that begin with `LC_`.
const EVERYWHERE: [&str; 4] = ["LANG", "LANGUAGE", "NO_COLOR", "TZ"];
/// Search path for programs in a root that is not the host's.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Error: an environment variable cannot be given to the command.
#[derive(Debug, thiserror::Error)]
#[error("--env '{}': give NAME=VALUE, NAME, or '*' for all", .0.display())]
pub struct NoName(OsString);

/// Returns the command's variables, from `ours` and the values of `--env`. `same_root`: the guest has the host's files;
/// `terminal`: the command is on a terminal; `home`: the command's HOME.
pub fn of_command(
    ours: &[(OsString, OsString)],
    given: &[OsString],
    same_root: bool,
    terminal: bool,
    home: &OsStr,
) -> Result<Vec<(OsString, OsString)>, NoName> {
    let mut pairs: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &OsStr, value: &OsStr| {
        pairs.retain(|(other, _)| other != name);
        pairs.push((name.into(), value.into()));
    };
    let value_of = |wanted: &OsStr| ours.iter().find(|(name, _)| name == wanted).map(|(_, value)| value);
    for (name, value) in ours {
        if if same_root { is_for_guest(name) } else { is_everywhere(name) } {
            set(name, value);
        }
    }
    let path = value_of("PATH".as_ref()).filter(|_| same_root);
    set("PATH".as_ref(), path.map_or(PATH.as_ref(), OsString::as_os_str));
    set("HOME".as_ref(), home);
    if let Some(kind) = value_of("TERM".as_ref()).filter(|_| terminal) {
        set("TERM".as_ref(), kind);
    }
    for item in given {
        let bytes = item.as_bytes();
        match memchr::memchr(b'=', bytes).and_then(|at| bytes.split_at_checked(at)) {
            Some((b"", _)) => return Err(NoName(item.clone())),
            Some((name, rest)) => set(OsStr::from_bytes(name), OsStr::from_bytes(rest.get(1..).unwrap_or_default())),
            None if item.is_empty() => return Err(NoName(item.clone())),
            None if item == "*" => ours.iter().for_each(|(name, value)| set(name, value)),
            None => {
                if let Some(value) = value_of(item) {
                    set(item, value);
                }
            }
        }
    }
    Ok(pairs)
}

/// Returns this process's own variables.
pub fn ours() -> Vec<(OsString, OsString)> {
    env::vars_os().collect()
}

fn is_for_guest(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return true };
    let upper = name.to_ascii_uppercase();
    !LEFT_OUT.contains(&name)
        && !LEFT_OUT_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
        && !SECRETS.iter().any(|part| upper.contains(part))
        && !upper.ends_with("ACCESS_KEY")
}

fn is_everywhere(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| EVERYWHERE.contains(&name) || name.starts_with("LC_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> Vec<(OsString, OsString)> {
        text.split_whitespace().filter_map(|pair| pair.split_once('=')).map(|(n, v)| (n.into(), v.into())).collect()
    }

    fn command(given: &[&str], same_root: bool, terminal: bool) -> String {
        let ours = named(
            "PATH=/opt/bin LANG=de LC_TIME=C USER=me CARGO_MANIFEST_DIR=/src RUST_BACKTRACE=1 GOFLAGS=-v TERM=xterm \
             LD_LIBRARY_PATH=/src/target PWD=/src DISPLAY=:0 SSH_AUTH_SOCK=/run/agent MAKEFLAGS=-j GITHUB_TOKEN=t \
             aws_secret_access_key=s AWS_ACCESS_KEY=k HOME=/home/me MY_OWN=x",
        );
        let given: Vec<OsString> = given.iter().map(OsString::from).collect();
        let pairs = of_command(&ours, &given, same_root, terminal, "/root".as_ref()).unwrap();
        pairs.iter().map(|(n, v)| format!("{}={}", n.display(), v.display())).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn test_runners_find_what_they_set() {
        assert_eq!(
            command(&[], true, false),
            "LANG=de LC_TIME=C USER=me CARGO_MANIFEST_DIR=/src RUST_BACKTRACE=1 GOFLAGS=-v \
             LD_LIBRARY_PATH=/src/target MY_OWN=x PATH=/opt/bin HOME=/root"
        );
        assert!(command(&[], true, true).ends_with(" TERM=xterm"));
    }

    #[test]
    fn other_roots_have_their_own() {
        assert_eq!(command(&[], false, false), format!("LANG=de LC_TIME=C PATH={PATH} HOME=/root"));
        let given = command(&["MY_OWN", "NOSUCH", "A=b=c", "HOME=/x"], false, false);
        assert_eq!(given, format!("LANG=de LC_TIME=C PATH={PATH} MY_OWN=x A=b=c HOME=/x"));
    }

    #[test]
    fn what_is_left_out_can_be_asked_for() {
        assert!(command(&["GITHUB_TOKEN"], true, false).ends_with(" GITHUB_TOKEN=t"));
        let all = command(&["*"], false, false);
        assert!(all.contains("DISPLAY=:0") && all.contains("PATH=/opt/bin"), "{all}");
    }

    #[test]
    fn variables_have_names() {
        for bad in ["", "=x"] {
            let error = of_command(&[], &[bad.into()], true, false, "/root".as_ref()).unwrap_err().to_string();
            assert_eq!(error, format!("--env '{bad}': give NAME=VALUE, NAME, or '*' for all"));
        }
    }
}
