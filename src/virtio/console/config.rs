//! Ports that a user asks for.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::MAX_PORTS;
use crate::backend::console::ConsoleEnd;
use crate::options;

/// Maximum length of a port's name.
const NAME_MAX: usize = 64;

/// `--console-port`: a port for data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortConfig {
    /// Name in the guest's `/dev/virtio-ports`: 1 to 64 characters of printable ASCII without `/`.
    pub name: String,
    /// Destination of the port.
    pub to: ConsoleEnd,
    /// File that provides the port's input, for destinations that have none: `file:` and `null`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
}

impl FromStr for PortConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("name"))
    }
}

impl PortConfig {
    /// Checks all ports of a machine together; the error is a sentence.
    pub fn validate(ports: &[PortConfig]) -> Result<(), String> {
        if ports.len() >= MAX_PORTS {
            return Err(format!("{} ports are too many: there can be at most {}", ports.len(), MAX_PORTS - 1));
        }
        for (i, PortConfig { name, to, from }) in ports.iter().enumerate() {
            if from.is_some() && !matches!(to, ConsoleEnd::File(_) | ConsoleEnd::Null) {
                return Err(format!("{name}: from= goes with to=file:PATH and to=null; {to} has input of its own"));
            }
            let good = |c: u8| c.is_ascii_graphic() && c != b'/';
            if name.is_empty() || name.len() > NAME_MAX || !name.bytes().all(good) {
                return Err(format!("invalid port name '{name}': use 1 to 64 printable ASCII characters, no '/'"));
            }
            if ports.iter().skip(i + 1).any(|other| other.name == *name) {
                return Err(format!("the name '{name}' is given twice"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let port: PortConfig = "agent,to=socket:/run/a".parse().unwrap();
        assert_eq!(port, PortConfig { name: "agent".into(), to: ConsoleEnd::Socket("/run/a".into()), from: None });
        let port: PortConfig = "log,to=file:out,from=in".parse().unwrap();
        assert_eq!(
            (port.from.as_deref(), PortConfig::validate(std::slice::from_ref(&port))),
            (Some("in".as_ref()), Ok(()))
        );
        let both = PortConfig { to: ConsoleEnd::Pty, ..port.clone() };
        assert!(
            PortConfig::validate(&[both]).unwrap_err().starts_with("log: from= goes with to=file:PATH and to=null")
        );
        assert!("name=x".parse::<PortConfig>().unwrap_err().to_string().contains("'to=' is missing"));
        assert!("x,to=nowhere".parse::<PortConfig>().unwrap_err().to_string().contains("none of stdio, stdin"));
        let many = vec![port; 32];
        assert!(PortConfig::validate(&many).unwrap_err().starts_with("32 ports are too many: there can be at most 31"));
    }
}
