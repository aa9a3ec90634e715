//! The guest side: process 1, containers, devices, statistics, served over ttrpc.

pub mod cgroup;
pub mod container;
pub mod init;
pub mod log;
pub mod process;
pub mod sandbox;
pub mod seccomp;
pub mod server;
pub mod storage;
pub mod sys;
pub mod transport;
pub mod uevent;
