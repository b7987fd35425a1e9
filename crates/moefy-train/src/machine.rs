//! How much memory the machine has for this process.

use std::fs;
use std::path::{Path, PathBuf};

/// The machine's memory, or that of the control group that the process is in, whichever is less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Bytes that there are.
    pub limit: u64,
    /// Bytes that can be had now.
    pub available: u64,
}

impl Machine {
    /// Reads what Linux says; none where it says nothing.
    pub fn read() -> Option<Self> {
        Self::read_under(Path::new("/"))
    }

    fn read_under(root: &Path) -> Option<Self> {
        let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
        let mut machine =
            Self { limit: kilobytes(&info, "MemTotal")?, available: kilobytes(&info, "MemAvailable")? };
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        for group in groups.lines().filter_map(|line| Group::of(root, line)) {
            for folder in group.folders() {
                let Some(limit) = group.number(&folder, group.limit) else { continue };
                let used = group.number(&folder, group.used).unwrap_or(0);
                // files that were read stay in memory only as long as nobody needs it
                let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
                let cached = value(&stat, "inactive_file").unwrap_or(0);
                machine.limit = machine.limit.min(limit);
                machine.available = machine.available.min(limit.saturating_sub(used.saturating_sub(cached)));
            }
        }
        Some(machine)
    }
}

/// The most memory that this process had at a time, in bytes; none where Linux does not say.
pub fn peak() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// A line `KEY: NUMBER kB`, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// A line `KEY NUMBER`.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?.trim().parse().ok()
}

/// A control group that limits memory.
struct Group {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The group's path in it.
    path: PathBuf,
    limit: &'static str,
    used: &'static str,
}

impl Group {
    /// From a line of /proc/self/cgroup, `ID:CONTROLLERS:PATH`; none if the group says nothing about memory.
    fn of(root: &Path, line: &str) -> Option<Self> {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        let mount = root.join("sys/fs/cgroup");
        if controllers.is_empty() {
            return Some(Self { mount, path: path.into(), limit: "memory.max", used: "memory.current" });
        }
        let memory = controllers.split(',').any(|controller| controller == "memory");
        memory.then(|| Self {
            mount: mount.join("memory"),
            path: path.into(),
            limit: "memory.limit_in_bytes",
            used: "memory.usage_in_bytes",
        })
    }

    /// The group's folder and those of the groups that it is in. In a container, paths may be those of the host: then
    /// only the mount itself is there.
    fn folders(&self) -> Vec<PathBuf> {
        self.path.ancestors().map(|path| self.mount.join(path)).collect()
    }

    fn number(&self, folder: &Path, file: &str) -> Option<u64> {
        fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const INFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  6000 kB\n");

    #[test]
    fn the_smallest_limit_counts() {
        let all =
            |limit: u64, available: u64| Some(Machine { limit: limit << 10, available: available << 10 });
        for (groups, expected) in [
            (&[][..], all(8000, 6000)),
            // version 2: a parent's limit counts, too, and cached files can be dropped
            (
                &[
                    ("proc/self/cgroup", "0::/a/b\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "max\n"),
                    ("sys/fs/cgroup/a/memory.max", "4096000\n"),
                    ("sys/fs/cgroup/a/memory.current", "3072000\n"),
                    ("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 1024000\n"),
                ],
                all(4000, 2000),
            ),
            // version 1, where the path is the host's
            (
                &[
                    ("proc/self/cgroup", "3:cpu,memory:/docker/x\n1:pids:/x\n"),
                    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2048000\n"),
                    ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1024000\n"),
                ],
                all(2000, 1000),
            ),
        ] {
            let root = files(&[&[INFO], groups].concat());
            assert_eq!(Machine::read_under(root.path()), expected, "{groups:?}");
        }
        assert_eq!(Machine::read_under(files(&[]).path()), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_memory() {
        let machine = Machine::read().unwrap();
        assert!(0 < machine.available && machine.available <= machine.limit);
        assert!(peak().unwrap() > 1 << 20);
    }
}
