//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/ringside-rdma/ringside/internal/netlink"
	"golang.org/x/sys/unix"
)

// Where things are in the machine's initial file system.
const (
	guestConfigFile = "/ringside-soft-roce.json" // also tells process 1 that it is the machine's, and no container's
	guestModules    = "/modules"                 // the modules and their modules.dep
	guestTools      = "/tools"                   // a layer with programs and libraries of RDMA
	guestHides      = "/hides"                   // a layer that hides what is the host's
	guestHost       = "/host"                    // the host's root, read-only
	guestRoot       = "/newroot"                 // the root that commands see
	guestCgroups    = "/sys/fs/cgroup"
	guestPort       = "ringside" // the virtio-serial port to the host
	serverRole      = "soft-roce-server"
)

// wantedModules are loaded by the machine, in this order, with what they need. rxe asks the crypto API for crc32 and siw
// for crc32c, so these come first. The first group is what file systems and the host's port need.
var wantedModules = [][]string{
	{"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"},
	{"crc32_generic", "crc32c_generic", "rdma_rxe", "siw", "rdma_ucm", "ib_umad", "veth"},
}

// A guestConfig is what the host tells the machine, in a file of the initramfs.
type guestConfig struct {
	Bare bool   // no RDMA links, and no network devices for them
	Work string // a folder shared for reading and writing, mounted at the same path as on the host
	Out  bool   // another one, mounted at /out
}

// bootMachine is the machine's process 1. It sets the machine up, starts the server as a process of its own and reaps what
// is left to it: the server could not, as waiting for just any child takes those that it waits for. It does not return.
func bootMachine() {
	err := func() error {
		config, err := setUpMachine()
		if err != nil {
			return err
		}
		return runServer(config)
	}()
	if err != nil {
		fmt.Println("soft-roce: machine:", err)
		reportFailure(err)
		time.Sleep(200 * time.Millisecond) // for the console to get out
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(1) // the kernel panics, and ends the machine that way
}

// reportFailure tells the host why there will be no machine. The console has said it, too, if the port is not there yet.
func reportFailure(err error) {
	port, openErr := openPort()
	if openErr != nil {
		return
	}
	defer port.Close()
	_ = (&frameWriter{w: port}).send(kindFailed, 0, []byte(err.Error()))
}

func setUpMachine() (*guestConfig, error) {
	if err := mountKernelFS(""); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(guestConfigFile)
	if err != nil {
		return nil, err
	}
	config := new(guestConfig)
	if err := json.Unmarshal(text, config); err != nil {
		return nil, fmt.Errorf("%s: %w", guestConfigFile, err)
	}
	stage("start")
	// Waiting for the host's file system and loading RDMA's modules overlap.
	files := make(chan error, 1)
	go func() {
		err := loadModules(wantedModules[0])
		if err == nil {
			err = mountRoot(config)
		}
		stage("file systems")
		files <- err
	}()
	err = func() error {
		if err := loadModules(wantedModules[1]); err != nil {
			return err
		}
		stage("modules")
		return setUpNetwork(config.Bare)
	}()
	stage("network")
	return config, errors.Join(err, <-files)
}

// stage notes on the console how far the machine has come.
func stage(what string) { fmt.Printf("soft-roce: %.2f s: %s\n", uptime(), what) }

func uptime() float64 {
	text, _ := os.ReadFile("/proc/uptime")
	first, _, _ := strings.Cut(string(text), " ")
	s, _ := strconv.ParseFloat(first, 64)
	return s
}

func setUpNetwork(bare bool) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	lo, err := netdevIndex("lo")
	if err != nil {
		return err
	}
	if err := c.Do(setUp(lo, 0)); err != nil {
		return fmt.Errorf("set up the network device lo: %w", err)
	}
	if bare {
		return nil
	}
	w := newWiring("veth")
	return w.up()
}

// loadModules loads modules and what they need.
func loadModules(wanted []string) error {
	text, err := os.ReadFile(guestModules + "/modules.dep")
	if err != nil {
		return err
	}
	graph, err := parseModuleGraph(text)
	if err != nil {
		return err
	}
	var there []string
	for _, name := range wanted {
		if _, ok := graph[name]; ok { // else it is part of this kernel: the image has all that are not
			there = append(there, name)
		}
	}
	order, err := graph.order(there...)
	if err != nil {
		return err
	}
	for _, name := range order {
		if err := loadModule(name); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

func loadModule(name string) error {
	f, err := os.Open(guestModules + "/" + name + ".ko")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// runServer starts the server and returns when it has ended.
func runServer(config *guestConfig) error {
	server := exec.Command("/proc/self/exe")
	server.Args = []string{serverRole}
	server.Stdout, server.Stderr = os.Stdout, os.Stderr
	if err := server.Start(); err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait for the server: %w", err)
		case pid == server.Process.Pid:
			if status.ExitStatus() != 0 {
				return fmt.Errorf("the server ended with status %d", status.ExitStatus())
			}
			return unmountShares(config)
		}
	}
}
