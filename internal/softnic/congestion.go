package softnic

import (
	"fmt"
	"os"
)

// EnvCongestion names the environment variable that switches congestion control of connections over UDP off:
//
//	RINGSIDE_SOFT_CC=off
//
// A connection then sends as much as its window allows, whatever becomes of it, and its packets do not say that networks may mark
// them. The peer's connections are the peer's to switch. What it costs where there is no congestion is in docs/performance.md.
const EnvCongestion = "RINGSIDE_SOFT_CC"

// congestionFromEnv is what the environment asks for.
func congestionFromEnv() (on bool, err error) {
	switch v := os.Getenv(EnvCongestion); v {
	case "", "on":
		return true, nil
	case "off":
		return false, nil
	default:
		return false, fmt.Errorf("%s=%q: want on or off", EnvCongestion, v)
	}
}

// notified takes a CNP. Called with port.mu held.
func (w *wireQP) notified() {
	w.q.sq.Lock()
	if w.req != nil && !w.over {
		w.req.Notify()
	}
	w.q.sq.Unlock()
}
