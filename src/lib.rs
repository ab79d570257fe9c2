//! vireo, a virtual machine monitor.
