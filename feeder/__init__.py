"""The feeder: owns the host store and every slot. Never imports the engine."""
